"""What shipped probes and a decision cost a query, and how fast the machine was while that was measured."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from decision_speed import CANDIDATES, OBJECTIVES, RULES, decision
from results_file import Row
from routing_data import routellm

from probes.artifact import read
from probes.extract import Encoder, best_dtype
from probes.manifest import ARTIFACTS, default_artifact_path
from probes.static import StaticProbe
from probes.text import render

SIZES = (1, 16)
BATCHES = 8
ROUNDS = 9
ASKED = 200
CALLS = 100
TOKENS, NARROW, WIDE = 1024, 384, 1536
"""Of the reference product, which is one of the encoder's own."""


def latency_rows(data: Path, encoder: Encoder, seed: int = 0) -> list[Row]:
    """CPU time a query, one thread, through tokeniser, encoder and shipped heads: each batch's median of nine rounds
    that take turns over all batches; intervals are p5 to p95 of the batches. Prompts are drawn from the whole table."""
    artifact = read(default_artifact_path())
    layers, most = list(artifact.manifest.layers), artifact.manifest.max_tokens
    drawn: list[tuple[str, int, list[str]]] = []
    rows: list[Row] = []
    for name in ("mmlu", "gsm8k"):
        prompts = routellm(data, name).prompts
        chosen = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[: BATCHES * max(SIZES)]]
        rows.append(Row(f"{name}, drawn", "length", float(np.mean(encoder.lengths(chosen, most))), unit="tokens"))
        drawn += [(name, size, chosen[at * size : (at + 1) * size]) for size in SIZES for at in range(BATCHES)]
    a, b = (torch.randn(shape, dtype=best_dtype()) for shape in ((TOKENS, NARROW), (NARROW, WIDE)))

    def ask(batch: list[str]) -> None:
        states = encoder.features(batch, layers=layers, max_tokens=most)
        artifact.heads.predict_proba(states.reshape(len(batch), -1))

    spent = np.empty((ROUNDS, len(drawn)))
    product = np.empty((ROUNDS, len(drawn)))
    for turn in range(ROUNDS):
        for at, (_, size, batch) in enumerate(drawn):
            product[turn, at] = _cpu(lambda: torch.mm(a, b))
            spent[turn, at] = _cpu(lambda batch=batch: ask(batch)) / size  # type: ignore[misc]  # mypy takes no default
    each = 1e3 * np.median(spent, 0)
    for name in ("mmlu", "gsm8k"):
        for size in SIZES:
            chosen_ms = each[[at for at, (of, many, _) in enumerate(drawn) if (of, many) == (name, size)]]
            low, high = map(float, np.quantile(chosen_ms, [0.05, 0.95]))
            rows.append(Row(f"{name}, batch of {size}", "CPU a query", float(np.mean(chosen_ms)), low, high, "ms"))
    speeds = 2e-9 * TOKENS * NARROW * WIDE / product
    low, middle, high = map(float, np.quantile(speeds, [0.05, 0.5, 0.95]))
    shape = f"{TOKENS} x {NARROW} x {WIDE}"
    return [*rows, Row(f"the machine meanwhile, product of {shape}", "speed", middle, low, high, "GFLOP/s")]


def worker_rows(data: Path, _: Encoder, seed: int = 0) -> list[Row]:
    """What is computed in a gateway's worker, CPU time of one thread: the shipped static probe, rendering included, on
    prompts drawn from the whole tables, each its median of nine rounds, p5 to p95 of the prompts; a decision of many
    rules and candidates by each objective, p5 to p95 of many rounds."""
    rows = []
    probe = StaticProbe.load(ARTIFACTS / "static")
    for name in ("mmlu", "gsm8k"):
        prompts = routellm(data, name).prompts
        chosen = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:ASKED]]
        talks = [[{"role": "user", "content": prompt}] for prompt in chosen]
        spent = [[_cpu(lambda talk=talk: probe.read(render(talk))) for talk in talks] for _ in range(ROUNDS)]  # type: ignore[misc]
        each = 1e6 * np.median(spent, 0)
        low, high = map(float, np.quantile(each, [0.05, 0.95]))
        rows.append(Row(f"static probe, {name}", "CPU a query", float(np.mean(each)), low, high, "µs"))
    for objective in OBJECTIVES:
        decide = decision(objective)
        rounds = [_cpu(lambda: [decide() for _ in range(CALLS)]) / CALLS * 1e6 for _ in range(CALLS)]  # noqa: B023
        low, middle, high = map(float, np.quantile(rounds, [0.05, 0.5, 0.95]))
        shape = f"{RULES} rules x {CANDIDATES} candidates"
        rows.append(Row(f"decision, {shape}, {objective}", "CPU a query", middle, low, high, "µs"))
    return rows


def _cpu(work: Callable[[], object]) -> float:
    """Seconds of this thread's processor."""
    began = time.thread_time()
    work()
    return time.thread_time() - began
