"""Step speculation beside base alone, draft alone and token speculation: speed, accuracy, tokens, cost, and the bound.

The bound is the time that the passes would take which the run really made, if each cost what it costs alone
(field formula: T = sum over steps of c_small + verify + (1 - a) c_base): the draft's tokens and the base's passes at
what one of their tokens costs alone, each further row of a pass at what a row adds to it. What is missing to it is the
cost of running two models by turns.
"""

import time
from collections.abc import Sequence
from typing import Final

import torch
from measured import Measured
from reasoning_run import Kind, Outcome, ask_all, draw, load

from local_engine.arithmetic import Problem
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment, new_kv
from local_engine.types import SpeculateSteps

DEARER: Final = 10.0
DRAFTS: Final = ("draft", "nano")
DEFAULTS: Final = {"unsure": -0.25, "lookahead": 4, "max_step_tokens": 48}
"""What was best on problems of another seed: see docs/experiments.md."""


def kinds() -> list[Kind]:
    def plan(draft: str, **options: object) -> SpeculateSteps:
        return SpeculateSteps(draft=draft, **options)  # type: ignore[arg-type]  # names and types as in the table below

    found = [Kind("leave it off: base alone")]
    for draft in DRAFTS:
        found += [
            Kind(f"{draft} alone", model=draft),
            Kind(f"{draft}: score, a step at a time", plan=plan(draft)),
            Kind(f"{draft}: score, rejected steps by base", plan=plan(draft, repair="step")),
            Kind(f"{draft}: score, unsure asks, 4 steps", plan=plan(draft, **DEFAULTS)),
        ]
    found += [
        Kind("base: token speculation", speculation="auto"),
        Kind("nano: score, unsure asks, with token speculation", plan=plan("nano", **DEFAULTS), speculation="auto"),
        Kind("draft: specreason", plan=plan("draft", method="specreason")),
        Kind("draft: glimprouter", plan=plan("draft", method="glimprouter", threshold=0.3)),
        Kind("draft: speculative_thinking", plan=plan("draft", method="speculative_thinking")),
        Kind("draft: entropy", plan=plan("draft", method="entropy", threshold=0.05)),
    ]
    return found


def measure(seed: int, levels: Sequence[int], n: int, batches: Sequence[int], into: Measured) -> None:
    torch.set_num_threads(1)
    models = load()
    for batch in batches:
        asked = draw(seed, levels, n)
        ways = kinds()
        outcomes = ask_all(models, ways, asked, batch)
        rows_s = {name: row_s(model) for name, model in models.items()}
        _tell(ways, outcomes, rows_s, asked, batch, into)


def _tell(
    ways: Sequence[Kind], outcomes: dict[str, Outcome], rows_s: dict[str, float], asked: Sequence[Problem], batch: int,
    into: Measured,
) -> None:  # fmt: skip
    off = outcomes[ways[0].name]
    token_s = {
        kind.model: outcomes[kind.name].cpu_s / outcomes[kind.name].tokens
        for kind in ways
        if kind.plan is None and kind.speculation == "off"
    }
    measured = {name: seconds / token_s["draft"] for name, seconds in token_s.items()}
    dearer = {**measured, "base": DEARER * measured["base"]}
    for kind in ways:
        did, name = outcomes[kind.name], f"batch {batch}: {kind.name}"
        n = len(did.right)
        into.add(name, "problems", n, "problems")
        into.add(name, "accuracy", sum(did.right) / n, "share")
        gains = [mine - theirs for mine, theirs in zip(did.right, off.right, strict=True)]
        into.add(name, "points_over_off", 100 * sum(gains) / n, "points")
        into.add(name, "cpu_speedup", off.cpu_s / did.cpu_s, "ratio")
        into.add(name, "wall_speedup", off.wall_s / did.wall_s, "ratio")
        into.add(name, "text_tokens", did.tokens / n, "tokens")
        for metric, prices in (("cost", measured), ("cost_base_10x", dearer)):
            into.add(name, metric, did.cost(kind, prices) / off.cost(ways[0], prices), "ratio")
        for level in sorted({problem.level for problem in asked}):
            of_level = [right for right, problem in zip(did.right, asked, strict=True) if problem.level == level]
            into.add(name, f"accuracy_{level}", sum(of_level) / len(of_level), "share")
        if isinstance(kind.plan, SpeculateSteps):
            draft = kind.plan.draft
            uses = did.uses()
            into.add(name, "base_written", did.written("base") / n, "tokens")
            into.add(name, "base_computed", did.computed("base") / n, "tokens")
            into.add(name, "draft_written", did.written(draft) / n, "tokens")
            into.add(name, "draft_accepted", sum(use.accepted_tokens for use in uses) / n, "tokens")
            steps = sum(use.drafted_steps for use in uses)
            into.add(name, "steps_accepted", sum(use.accepted_steps for use in uses) / max(1, steps), "share")
            bound_s = sum(
                did.written(model) * token_s[model] + max(0, _rows_beyond(did, model)) * rows_s[model]
                for model in ("base", draft)
            )
            into.add(name, "bound", off.cpu_s / bound_s, "ratio")
            into.add(name, "of_the_bound", bound_s / did.cpu_s, "ratio")


def _rows_beyond(did: Outcome, model: str) -> int:
    """Rows of its passes beyond one for each token that it wrote, its prompts aside, which its tokens' price holds."""
    prompts = sum(use.input_tokens for each in did.uses() for use in each.models if use.model == model)
    return did.computed(model) - prompts - did.written(model)


def row_s(model: LocalModel, *, rows: int = 13) -> float:
    """What a row more adds to a pass, by passes over one and over `rows`; the best of several."""
    kv = new_kv(model, 1 << 26)
    runner = Runner(model, kv)
    slot = kv.open(128)
    runner.run([Segment(slot, 0, list(range(48)), 1)])
    best = {1: float("inf"), rows: float("inf")}
    for _ in range(20):
        for count in best:
            began = time.process_time()
            for _ in range(10):
                runner.run([Segment(slot, 48, list(range(count)), count)])
                kv.truncate(slot, 48)
            best[count] = min(best[count], (time.process_time() - began) / 10)
    return max(0.0, best[rows] - best[1]) / (rows - 1)
