"""What an accept rule gives on real, recorded answers: `python benchmarks/reasoning_recorded.py ../shared/data`.

Pairs of a weaker and a stronger model on GSM8K: RouteLLM's Mixtral and GPT-4, and ZeroEval's, with their thoughts.
Recorded answers have no log-probabilities, so the rule reads the text: how long it is, whether its own arithmetic holds
(every "a + b = c" in it is computed), how it hedges, and, with the encoder, what it says. Beside it stand the answer's
length alone, and a probe on the question alone. Everything is out of fold (5 folds by question); the threshold for
"accepted and wrong, while the stronger is right" is certified on half of the questions and counted on the other half,
200 times. Writes benchmarks/results/reasoning-recorded.json.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from measured import Measured, show
from results_file import write
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.certify import accept_losses, certify
from probes.extract import Encoder

DATA: Final = Path(os.environ.get("LEADLINE_DATA") or Path(__file__).parents[2] / "shared" / "data")
ALPHA: Final = 0.02
SPLITS: Final = 200
ROUTELLM_PRICES: Final = (0.24, 24.7)
"""USD per million tokens of Mixtral-8x7B and GPT-4-1106, as RouteLLM (arXiv 2406.18665) has them."""
ZEROEVAL_PAIRS: Final = (
    ("gemma-2-2b-it", "gpt-4o-2024-08-06"),
    ("Qwen2-7B-Instruct", "gpt-4o-2024-08-06"),
    ("Meta-Llama-3.1-8B-Instruct", "claude-3-5-sonnet-20241022"),
    ("gpt-4o-mini-2024-07-18", "claude-3-5-sonnet-20241022"),
)
COLUMNS: Final = {
    "auc": "AUC", "risk_at_50": "wrong at 50 % accepted", "risk_at_80": "wrong at 80 %", "accepted": "accepted",
    "risk": "realised risk", "points": "points over strong", "saved": "cost saved",
}  # fmt: skip
_SUM: Final = re.compile(
    r"(?<![\d.])\$?(\d[\d,]*(?:\.\d+)?)\s*([-+*/x×])\s*\$?(\d[\d,]*(?:\.\d+)?)\s*=\s*(?:<<[^>]*>>)?\s*\$?(-?\d[\d,]*(?:\.\d+)?)"
)
_HEDGES: Final = re.compile(
    r"\b(however|but|assum\w*|approximately|about|wait|actually|cannot|not enough|unclear|sorry|let's|if we)\b",
    re.IGNORECASE,
)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A weaker and a stronger model's answers to the same questions."""

    name: str
    questions: list[str]
    answers: list[str]
    """The weaker one's."""
    weak: Array
    strong: Array
    """Right, 0 or 1."""
    weak_cost: Array
    strong_cost: Array
    """Of writing the answer, USD."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="folder with the recorded answers")
    parser.add_argument("--no-encoder", action="store_true", help="text features and length alone")
    options = parser.parse_args()
    if not (options.data / "routellm_gsm8k.parquet").exists():
        print(f"no recorded answers in {options.data}: name their folder, or set LEADLINE_DATA; nothing measured")
        return
    torch.set_num_threads(1)
    encoder = None if options.no_encoder else Encoder.load()
    into = Measured()
    for pair in [routellm(options.data), *zeroeval(options.data)]:
        for score_name, score in scores(pair, encoder).items():
            tell(f"{pair.name}: {score_name}", pair, score, into)
    rows = into.rows()
    show(rows, "recorded GSM8K answers", COLUMNS)
    print(write("reasoning-recorded", "python benchmarks/reasoning_recorded.py", ("scikit-learn", "torch"), rows))


def routellm(data: Path) -> Recorded:
    table = pd.read_parquet(data / "routellm_gsm8k.parquet")
    table = table[~table["contaminated"].astype(bool)]
    weak, strong = ROUTELLM_PRICES
    return Recorded(
        "Mixtral-8x7B → GPT-4-1106",
        table["prompt"].tolist(),
        table["mixtral_8x7b_response"].tolist(),
        table["mixtral_8x7b_correct"].to_numpy(float),
        table["gpt4_1106_correct"].to_numpy(float),
        _cost(table["mixtral_8x7b_response"], weak),
        _cost(table["gpt4_1106_response"], strong),
    )


def zeroeval(data: Path) -> list[Recorded]:
    answers = pd.read_parquet(data / "zeroeval_reasoning.parquet")
    questions = pd.read_parquet(data / "zeroeval_queries.parquet").set_index("qid")["question"]
    prices = pd.read_csv(data / "zeroeval_prices.csv").set_index("model")["usd_out_per_mtok"]
    found = []
    for weak, strong in ZEROEVAL_PAIRS:
        theirs = answers[answers["model"] == weak].merge(
            answers[answers["model"] == strong], on="qid", suffixes=("_weak", "_strong")
        )
        found.append(
            Recorded(
                f"{weak} → {strong}",
                questions.loc[theirs["qid"]].tolist(),
                theirs["output_weak"].tolist(),
                theirs["correct_weak"].to_numpy(float),
                theirs["correct_strong"].to_numpy(float),
                _cost(theirs["output_weak"], float(prices[weak])),
                _cost(theirs["output_strong"], float(prices[strong])),
            )
        )
    return found


def scores(pair: Recorded, encoder: Encoder | None) -> dict[str, Array]:
    """P(the weaker one's answer is right), out of fold, by what it is read from."""
    text = np.array([features(q, a) for q, a in zip(pair.questions, pair.answers, strict=True)])
    found = {"answer length": text[:, :1], "text": text}
    if encoder is not None:
        said, asked = (np.asarray(encoder.embed(texts)[0], float) for texts in (pair.answers, pair.questions))
        found |= {"question-only probe": asked, "text and encoder": np.hstack([text, said, asked])}
    return {name: _out_of_fold(values, pair.weak) for name, values in found.items()}


def features(question: str, answer: str) -> list[float]:
    """Length first; then what the text shows of its own soundness."""
    thought = _thought(answer)
    sums = [_holds(match) for match in _SUM.finditer(thought)]
    asked, used = (set(re.findall(r"\d+(?:\.\d+)?", part.replace(",", ""))) for part in (question, thought))
    last = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return [
        float(np.log1p(len(answer))),
        float(len([line for line in thought.splitlines() if line.strip()])),
        float(len(sums)),
        float(sums.count(False)),
        sums.count(False) / max(1, len(sums)),
        float(len(_HEDGES.findall(thought))),
        len(asked & used) / max(1, len(asked)),
        float("." in last[-1] if last else 1.0),
        float(bool(last) and last[-1].startswith("-")),
        float(np.log1p(len(question))),
        float(not last),
    ]


def _thought(answer: str) -> str:
    """Of ZeroEval's JSON, the reasoning; of text, all."""
    try:
        parsed: Any = json.loads(answer, strict=False)
    except ValueError:
        return answer
    return str(parsed.get("reasoning", answer)) if isinstance(parsed, dict) else answer


def _holds(match: re.Match[str]) -> bool:
    left, right, said = (float(part.replace(",", "")) for part in match.group(1, 3, 4))
    match match[2]:
        case "+":
            value = left + right
        case "-":
            value = left - right
        case "/":
            value = left / right if right else float("inf")
        case _:
            value = left * right
    return abs(value - said) <= 0.011 * max(1.0, abs(value))


def _out_of_fold(values: Array, right: Array) -> Array:
    wide = values.shape[1] > 50
    steps = [StandardScaler(), *([PCA(48, random_state=0)] if wide else [])]
    probe = make_pipeline(*steps, LogisticRegression(C=0.05 if wide else 1.0, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found: Array = cross_val_predict(probe, values, right, cv=folds, method="predict_proba")[:, 1]
    return found


def tell(name: str, pair: Recorded, score: Array, into: Measured) -> None:
    order = np.argsort(-score, kind="stable")
    into.add(name, "auc", float(roc_auc_score(pair.weak, score)), "auc")
    for share in (50, 80):
        taken = order[: len(order) * share // 100]
        into.add(name, f"risk_at_{share}", float(1 - pair.weak[taken].mean()), "share")
    rng, costly = np.random.default_rng(0), (1 - pair.weak) * pair.strong
    accepted, risks, points, saved = [], [], [], []
    for _ in range(SPLITS):
        rows = rng.permutation(len(score))
        known, fresh = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        threshold = certify(accept_losses(score[known], costly[known]), ALPHA, "crc").value
        takes = score[fresh] > threshold
        good = np.where(takes, pair.weak[fresh], pair.strong[fresh])
        cost = pair.weak_cost[fresh].sum() + pair.strong_cost[fresh][~takes].sum()
        accepted.append(takes.mean())
        risks.append((takes * costly[fresh]).mean())
        points.append(100 * (good - pair.strong[fresh]).mean())
        saved.append(1 - cost / pair.strong_cost[fresh].sum())
    for metric, values in (("accepted", accepted), ("risk", risks), ("points", points), ("saved", saved)):
        into.add(name, metric, float(np.mean(values)), "mean")


def _cost(answers: Sequence[str], usd_per_mtok: float) -> Array:
    """A token is about four characters."""
    return np.array([len(answer) / 4 * usd_per_mtok / 1e6 for answer in answers])


if __name__ == "__main__":
    main()
