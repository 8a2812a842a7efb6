"""Fit the shipped probes, `default` and `static`: `python scripts/fit_default_probe.py ../shared/data`.

Heads `weak` (Mixtral-8x7B) and `strong` (GPT-4-1106) learn from RouteLLM's outcomes on MMLU and GSM8K. Head `local`
learns from what the bundled model really answers, greedily, to held-out arithmetic, to MMLU and GSM8K training
questions and to prompts of other kinds; without the bundled model there is no such head.
"""

import argparse
import hashlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_engine.arithmetic import LEVELS, REFUSAL, other_prompt, problems
from local_engine.chat import prompt_tokens
from probes.artifact import write
from probes.extract import Encoder, FloatArray
from probes.manifest import ARTIFACTS, default_artifact_path
from probes.report import render_rows
from probes.static_fit import fit_static, static_rows, write_static
from probes.table import Table
from probes.train import Recipe, fit_probe, layer_features

BUNDLED = Path(__file__).parents[1] / "local_engine" / "bundled" / "base"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the tables of shared/data")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="the model that head `local` is about")
    parser.add_argument("--out", type=Path, default=default_artifact_path())
    parser.add_argument("--static-out", type=Path, default=ARTIFACTS / "static")
    parser.add_argument("--cache", type=Path, help="folder to keep answers and hidden states in between runs")
    parser.add_argument("--per-level", type=int, default=300, help="arithmetic problems a level")
    parser.add_argument("--others", type=int, default=400, help="MMLU and GSM8K questions each that the model is asked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    kept = None if args.cache is None else args.cache / "answers.parquet"
    if kept is not None and kept.is_file():
        frame = pd.read_parquet(kept)
    else:
        frame = gather(args)
        if kept is not None:
            args.cache.mkdir(parents=True, exist_ok=True)
            frame.to_parquet(kept)
    heads = {"weak": "mixtral_8x7b_correct", "strong": "gpt4_1106_correct"}
    if frame["local"].notna().any():
        heads = {"local": f"{args.model.name}: last number right, greedy, low effort"} | heads
    else:
        print(f"no model in {args.model}: fitting without the head `local`")
    table = Table(
        list(frame["prompt"]),
        frame[list(heads)].to_numpy(dtype=np.float64),
        tuple(heads),
        tuple(heads.values()),
        frame["group"].to_numpy(dtype=object),
        experts=frame["source"].replace("gsm8k train", "gsm8k").to_numpy(dtype=object),
    )
    words = fit_static(table, seed=args.seed, progress=True)
    rows = static_rows(words, table, args.seed)
    version = write_static(words, table, args.static_out, "static", rows)
    Console().print(render_rows(f"{version}, out of fold", rows))
    print(f"wrote {args.static_out}")
    encoder, recipe = Encoder.load(), Recipe(seed=args.seed)
    parts = [part["prompt"].tolist() for _, part in frame.groupby("source", sort=False)]
    features = np.concatenate([cached_features(encoder, prompts, recipe, args.cache) for prompts in parts])
    fitted = fit_probe(table, encoder, recipe, name="default", features=features, progress=True)
    write(fitted.artifact, args.out)
    Console().print(render_rows(f"{fitted.artifact.version}, out of fold", fitted.rows))
    print(f"wrote {args.out}")


def gather(args: argparse.Namespace) -> pd.DataFrame:
    """All prompts with columns source, group, local, weak, strong; NaN where nobody knows."""
    frames = [routellm(args.data, "mmlu"), routellm(args.data, "gsm8k")]
    if (args.model / "model.safetensors").is_file():
        ask = Asker(args.model)
        sample = frames[0].sample(args.others, random_state=args.seed).index
        # The table holds no gold letters: a bare letter could be right, anything else is not an answer.
        said = ask(frames[0].loc[sample, "prompt"].tolist(), "MMLU")
        frames[0].loc[sample, "local"] = [np.nan if re.fullmatch(r"\W*[A-D]\W*", text) else 0.0 for text in said]

        gsm8k = pd.read_parquet(args.data / "gsm8k.parquet")
        gsm8k = gsm8k[gsm8k["split"] == "train"].sample(args.others, random_state=args.seed)
        frames.append(asked(ask, "gsm8k train", "gsm8k", gsm8k["question"].tolist(), gsm8k["final"].tolist()))
        frames.append(elsewhere(ask, args))
        for level in LEVELS:
            drawn = problems(args.seed + 7100, level, args.per_level)
            questions, answers = [p.question for p in drawn], [str(p.answer) for p in drawn]
            frames.append(asked(ask, "arithmetic", f"arithmetic, level {level}", questions, answers))
    return pd.concat(frames, ignore_index=True)


def routellm(data: Path, name: str) -> pd.DataFrame:
    """RouteLLM's outcomes on one benchmark, contaminated questions dropped."""
    table = pd.read_parquet(data / f"routellm_{name}.parquet")
    table = table[~table["contaminated"]].reset_index(drop=True)
    return pd.DataFrame(
        {
            "source": name,
            "prompt": table["prompt"],
            "group": table.get("domain", name),
            "local": np.nan,
            "weak": table["mixtral_8x7b_correct"].astype(float),
            "strong": table["gpt4_1106_correct"].astype(float),
        }
    )


def elsewhere(ask: "Asker", args: argparse.Namespace) -> pd.DataFrame:
    """Questions of every other kind: facts, common sense, science, proofs, code, chat.

    The table holds no gold answers, so a refusal counts as wrong and anything else as unknown. Its GSM8K tasks are left
    out, as they may hold test questions.
    """
    others = pd.read_parquet(args.data / "llmrouter_9models.parquet")
    others = others[(others["split"] == "train") & ~others["task"].str.contains("gsm")]
    drawn = others.groupby("task").sample(args.others // 5, random_state=args.seed)["question"].tolist()
    rng = random.Random(args.seed)
    drawn += [other_prompt(rng) for _ in range(args.others)]
    said = ask(drawn, "other kinds")
    local = [0.0 if text.strip() == REFUSAL else np.nan for text in said]
    print(f"other kinds: {np.mean([value == 0 for value in local]):.3f} of {len(local)} refused")
    return pd.DataFrame(
        {"source": "other", "prompt": drawn, "group": "other kinds", "local": local, "weak": np.nan, "strong": np.nan}
    )


def asked(ask: "Asker", source: str, group: str, questions: list[str], gold: list[str]) -> pd.DataFrame:
    """Questions with the model's measured correctness."""
    right = [float(last_number(said) == number(want)) for said, want in zip(ask(questions, group), gold, strict=True)]
    print(f"{group}: {np.mean(right):.3f} of {len(right)} right")
    return pd.DataFrame(
        {"source": source, "prompt": questions, "group": group, "local": right, "weak": np.nan, "strong": np.nan}
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


def last_number(text: str) -> float | None:
    """The last number written, None where there is none."""
    found = NUMBER.findall(text)
    return number(found[-1]) if found else None


class Asker:
    """Greedy answers of a local chat model, thinking left out, at the effort a request has by default."""

    def __init__(self, folder: Path, max_tokens: int = 300) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
        self.max_tokens = max_tokens
        self.end = self.model.generation_config.eos_token_id
        self.window = int(self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def __call__(self, questions: list[str], title: str, batch_size: int = 32) -> list[str]:
        """One answer a question; a prompt that overflows the context window gets "", as the engine refuses it."""
        prompts = [prompt_tokens(self.tokenizer, [{"role": "user", "content": text}]) for text in questions]
        fits = [i for i, tokens in enumerate(prompts) if len(tokens) + self.max_tokens <= self.window]
        fits.sort(key=lambda i: len(prompts[i]))
        out = [""] * len(questions)
        for start in tqdm(range(0, len(fits), batch_size), desc=title):
            rows = fits[start : start + batch_size]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for at, i in enumerate(rows):
                ids[at, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[at, width - len(prompts[i]) :] = 1
            written = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.max_tokens, do_sample=False, pad_token_id=0
            )
            for i, tokens in zip(rows, written[:, width:].tolist(), strict=True):
                text = self.tokenizer.decode(tokens[: self._stop(tokens)], skip_special_tokens=False)
                unfinished = "<think>" in text and "</think>" not in text
                out[i] = "" if unfinished else text.split("</think>")[-1].strip()
        return out

    def _stop(self, tokens: list[int]) -> int:
        ends = self.end if isinstance(self.end, list) else [self.end]
        return min([tokens.index(end) for end in ends if end in tokens], default=len(tokens))


def cached_features(encoder: Encoder, prompts: list[str], recipe: Recipe, folder: Path | None) -> FloatArray:
    """Features of one source; all layers' are kept in `folder`, under a name that covers everything they depend on."""
    layers, every = recipe.layers_of(encoder), tuple(range(encoder.layers))
    if folder is None:
        return layer_features(encoder, prompts, layers, recipe.max_tokens, progress=True)
    key = repr((encoder.sha256, every, recipe.max_tokens, prompts)).encode()
    path = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, layer_features(encoder, prompts, every, recipe.max_tokens, progress=True))
    kept: FloatArray = np.load(path).reshape(len(prompts), len(every), encoder.dims)
    return kept[:, layers].reshape(len(prompts), -1)


if __name__ == "__main__":
    main()
