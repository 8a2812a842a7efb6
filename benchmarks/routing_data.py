"""The tables of ../shared/data as arrays, and hidden states that are computed once and kept in .bench/routing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from probes.calibrate import Array
from probes.extract import Encoder, FloatArray
from probes.train import DEFAULT_LAYERS

KEPT = Path(__file__).parents[1] / ".bench" / "routing"
MAX_TOKENS = 256
ROUTELLM = ("mixtral_8x7b_correct", "gpt4_1106_correct")
PAIRS = (
    ("Meta-Llama-3.1-8B-Instruct", "gpt-4o-2024-08-06"),
    ("gpt-4o-mini-2024-07-18", "o1-mini-2024-09-12"),
    ("claude-3-5-haiku-20241022", "claude-3-5-sonnet-20241022"),
    ("Qwen2-7B-Instruct", "Qwen2-72B-Instruct"),
    ("gemma-2-2b-it", "claude-3-5-sonnet-20241022"),
)
"""Weak and strong model of each pair of field/routing.md, A.1."""


@dataclass(frozen=True)
class Outcomes:
    """Prompts with what each model made of them: `scores` [n, models] in [0, 1]; `cost` in USD, where it is known."""

    prompts: list[str]
    groups: npt.NDArray[np.object_]
    models: tuple[str, ...]
    scores: Array
    cost: Array | None = None

    def column(self, model: str) -> Array:
        return np.asarray(self.scores[:, self.models.index(model)])


def routellm(data: Path, name: str) -> Outcomes:
    """RouteLLM's outcomes on `mmlu` or `gsm8k`, contaminated questions dropped; models `weak` and `strong`."""
    table = pd.read_parquet(data / f"routellm_{name}.parquet")
    table = table[~table["contaminated"]]
    groups = table["domain"] if "domain" in table else pd.Series(name, index=table.index)
    scores = table[list(ROUTELLM)].to_numpy(dtype=np.float64)
    return Outcomes(list(table["prompt"]), groups.to_numpy(dtype=object), ("weak", "strong"), scores)


def zeroeval(data: Path, *, priced: bool = False) -> Outcomes:
    """ZeroEval's models that answered every question; with `priced`, those whose bill is known.

    The hidden reasoning tokens of the o1 models are not counted in their cost, and some prices could not be verified:
    neither kind is in the priced pool.
    """
    queries = pd.read_parquet(data / "zeroeval_queries.parquet")
    results = pd.read_parquet(data / "zeroeval_results.parquet").astype({"task": str, "qid": str})
    key = pd.MultiIndex.from_arrays([queries["task"].astype(str), queries["qid"].astype(str)])
    correct, cost = (
        results.pivot_table(index=["task", "qid"], columns="model", values=column, aggfunc="first").reindex(key)
        for column in ("correct", "cost_usd_est")
    )
    whole = correct.columns[correct.notna().all().to_numpy() & cost.notna().all().to_numpy()]
    if priced:
        prices = pd.read_csv(data / "zeroeval_prices.csv").set_index("model")["source"]
        whole = [m for m in whole if "unverified" not in prices.get(m, "unverified") and not m.startswith("o1")]
    return Outcomes(
        list(queries["question"]), queries["task"].astype(str).to_numpy(dtype=object), tuple(whole),
        correct[list(whole)].to_numpy(dtype=np.float64), cost[list(whole)].to_numpy(dtype=np.float64),
    )  # fmt: skip


def llmrouter(data: Path) -> Outcomes:
    """The nine open models; rows of their train split only (the development part has no others)."""
    table = pd.read_parquet(data / "llmrouter_9models.parquet")
    table = table[table["split"] == "train"]
    models = tuple(table.columns[4:])
    groups = table["task"].to_numpy(dtype=object)
    return Outcomes(list(table["question"]), groups, models, table[list(models)].to_numpy(dtype=np.float64))


def hidden(encoder: Encoder, prompts: Sequence[str]) -> FloatArray:
    """[n, layers * dims] of all layers; kept under a name that covers everything it depends on."""
    key = hashlib.sha256(repr((encoder.sha256, MAX_TOKENS, list(prompts))).encode()).hexdigest()[:16]
    path = KEPT / f"{key}.npy"
    if path.is_file():
        kept: FloatArray = np.load(path)
        return kept
    found = encoder.features(prompts, max_tokens=MAX_TOKENS, progress=True).reshape(len(prompts), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return found


def read_by_probe(states: FloatArray, dims: int = 384) -> FloatArray:
    """Of all layers' hidden states those that the shipped recipe reads, [n, DEFAULT_LAYERS * dims]."""
    return states.reshape(len(states), -1, dims)[:, DEFAULT_LAYERS].reshape(len(states), -1)
