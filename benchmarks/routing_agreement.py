"""Agreement cascades on recorded outcomes: two cheap models answer, and the strong one where they differ.

Agreement-based cascading (Kolawole et al., arXiv 2407.02348) takes an answer on which an ensemble of small models
agrees, "where ABC achieves a 2-25x reduction in average price per token/request". Every call is billed here: both
cheap ones always, the strong one where they differ.

ZeroEval keeps which answers are right, and for six models on GSM8K what they are. Two right answers agree, a right and
a wrong one do not; only of two wrong answers is it unknown whether they are the same. So each plan stands three times:
two wrong answers never agree (dearest, most accurate), always agree (cheapest, least accurate), and agree as often as
those of the six models on GSM8K do, counted apart for questions that the strong model solves and others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from results_file import Row
from routing_data import Outcomes

from gateway.agreement import final_answer
from probes.calibrate import Array
from probes.evaluate import IntArray, folds, interval, resamples

CHEAP = 0.1
"""Asked beside each other are models that cost at most this share of the strong one."""
GATES = np.linspace(0.05, 0.95, 19)
"""Quantiles of the cheap models' predicted success, from which on the cascade is asked; the strong one alone below."""

Pair = tuple[int, ...]
Agree = tuple[float, float]
"""The chance that two wrong answers are the same: where the strong model is right, and where it is not."""
NEVER, ALWAYS = (0.0, 0.0), (1.0, 1.0)


@dataclass(frozen=True)
class Answered:
    """Outcomes, and where they are recorded what the models answered."""

    table: Outcomes
    cost: Array
    said: dict[str, list[str]] = field(default_factory=dict)
    """By model, the final answer to each question."""

    def plan(self, pair: Pair, strong: int, wrong: Agree) -> tuple[Array, Array]:
        """Score and cost of each query. Recorded answers are compared, others by what is known of them."""
        scores, cost, models = self.table.scores, self.cost, self.table.models
        (a, b), right = pair, scores[:, strong] > 0.5
        both_right, both_wrong = scores[:, a] * scores[:, b], (1 - scores[:, a]) * (1 - scores[:, b])
        if self.said:
            first, second = self.said[models[a]], self.said[models[b]]
            same = np.array([x == y != "" for x, y in zip(first, second, strict=True)], float)
        else:
            same = both_right + both_wrong * np.where(right, *wrong)
        score = same * scores[:, a] + (1 - same) * scores[:, strong]
        return score, cost[:, a] + cost[:, b] + (1 - same) * cost[:, strong]


def recorded(data: Path, table: Outcomes) -> Answered:
    """The models of `table` whose answers on GSM8K are recorded, with what they said."""
    answers = pd.read_parquet(data / "zeroeval_reasoning.parquet").astype({"qid": str, "model": str})
    queries = pd.read_parquet(data / "zeroeval_queries.parquet")
    rows = np.flatnonzero((queries["task"].astype(str) == "gsm").to_numpy())
    qids = queries["qid"].astype(str).to_numpy()[rows]
    columns = [at for at, model in enumerate(table.models) if model in set(answers["model"])]
    models = tuple(table.models[at] for at in columns)
    texts = answers.pivot(index="qid", columns="model", values="output").loc[qids]
    if table.cost is None:
        raise ValueError("the table has no costs")
    part = Outcomes([table.prompts[i] for i in rows], table.groups[rows], models, table.scores[rows][:, columns])
    said = {model: [final_answer(text) or "" for text in texts[model]] for model in models}
    return Answered(part, table.cost[rows][:, columns], said)


def wrong_agree(known: Answered, strong: str) -> Agree:
    """How often two wrong answers of the recorded models other than `strong` are the same."""
    table, right = known.table, known.table.column(strong) > 0.5
    same: dict[bool, list[bool]] = {True: [], False: []}
    for a, b in combinations([model for model in table.models if model != strong], 2):
        for i in np.flatnonzero((table.column(a) < 0.5) & (table.column(b) < 0.5)):
            same[bool(right[i])].append(known.said[a][i] == known.said[b][i] != "")
    return float(np.mean(same[True])), float(np.mean(same[False]))


def agreement_rows(
    known: Answered, predicted: Array, cases: dict[str, Agree], chosen_for: Sequence[str], times: int, seed: int
) -> list[Row]:
    """Cost saved against always asking the best model, at no less accuracy. `predicted` [n, models]: P(success).

    For each of the cases `chosen_for` a pair of cheap models is chosen on four folds, as the cheapest that reaches the
    best model's accuracy there, and counted on the fifth, in every case; with and without a gate by what was predicted
    of the pair.
    """
    scores, cost = known.table.scores, known.cost
    n, strong = len(scores), int(scores.mean(0).argmax())
    base, spent = scores[:, strong], cost[:, strong]
    cheap = [at for at in range(scores.shape[1]) if cost[:, at].mean() <= CHEAP * spent.mean()]
    plans = {
        (pair, case): known.plan(pair, strong, wrong)
        for pair, (case, wrong) in product(combinations(cheap, 2), cases.items())
    }
    draws = list(resamples(n, times, seed))
    rows = []
    for gated, case in product((False, True), chosen_for):
        took = {name: (base.copy(), spent.copy()) for name in cases}
        for seen, unseen in folds(n, seed + 1):
            best: tuple[float, Pair, float] | None = None
            for pair in combinations(cheap, 2):
                p, (score, price) = predicted[:, pair].mean(1), plans[pair, case]
                for gate in (-np.inf, *np.quantile(p[seen], GATES)) if gated else (-np.inf,):
                    asked = p[seen] >= gate
                    got = np.where(asked, score[seen], base[seen]).mean()
                    paid = float(np.where(asked, price[seen], spent[seen]).sum())
                    if got >= base[seen].mean() - 1e-9 and paid < (best[0] if best else spent[seen].sum()):
                        best = paid, pair, float(gate)
            if best is None:
                continue
            asked = np.zeros(n, bool)
            asked[unseen] = predicted[unseen][:, best[1]].mean(1) >= best[2]
            for name in cases:
                for kept, value in zip(took[name], plans[best[1], name], strict=True):
                    kept[asked] = value[asked]
        title = ("agreement, gated by the probe" if gated else "agreement") + f", chosen for: {case}"
        for name, (score, price) in took.items():
            rows += _rows(f"{title} | counted for: {name}", score - base, price, spent, draws)
            if known.said:
                rows.append(Row(title, "wrong where strong is right", float((score < base).mean()), unit="share"))
    return rows


def _rows(title: str, gained: Array, price: Array, spent: Array, draws: Sequence[IntArray]) -> list[Row]:
    saved = [1 - float(price[i].sum() / spent[i].sum()) for i in draws]
    return [
        Row(
            title, "accuracy − always strong", float(gained.mean()), *interval([float(gained[i].mean()) for i in draws])
        ),
        Row(title, "cost saved", 1 - float(price.sum() / spent.sum()), *interval(saved), "share"),
    ]
