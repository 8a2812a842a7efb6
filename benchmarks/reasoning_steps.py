"""Step speculation beside base alone, draft alone and token speculation: speed, accuracy, tokens, cost, and the bound.

Answers are counted over all questions, some at a time; time is taken on some of them, one at a time, in turns.

The bound is the time that the passes would take which the run really made, if each cost what it costs alone
(field formula: T = sum over steps of c_small + verify + (1 - a) c_base): the draft's tokens and the base's passes at
what one of their tokens costs alone, each further row of a pass at what a row adds to it. What is missing to it is the
cost of running two models by turns. A draft's tokens come several a step, which costs less than alone, so the plan may
be faster than that. The strict bound takes them at what they cost without any step around them, as if a step of the
draft for each judgement were free.

Cost is metered: a token that is written has its model's price, one that is read READ_PRICE of it. A base that is ten
times dearer than its draft is one of a pair of real sizes; there a pass over a step takes about as long as one token
(field formula again: 20 tokens 0.115 s, one 0.085 s, of a 32B model), which gives `speedup_10x`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from measured import Measured
from reasoning_bench import Bench
from reasoning_run import Kind, Outcome, draw

from local_engine.model import LocalModel
from local_engine.plan_types import SpeculateSteps
from local_engine.reason.trajectories import Question
from local_engine.runner import Runner, Segment, new_kv

DEARER: Final = 10.0
DRAFTS: Final = ("draft", "nano")
BOTH: Final = ("base", "nano")
OFF: Final = Kind("leave it off: base alone")
STEPWISE: Final[dict[str, object]] = {"unsure": None, "lookahead": 1}
COLUMNS: Final = {
    "accuracy": "right", "points_over_off": "points over off", "cpu_speedup": "× CPU", "wall_speedup": "× wall",
    "bound": "bound", "of_the_bound": "of it", "strict_bound": "strict bound", "of_the_strict_bound": "of it",
    "cost": "cost", "cost_base_10x": "cost, base × 10",
    "speedup_10x": "×, base × 10",
}  # fmt: skip
TOKEN_COLUMNS: Final = {
    "text_tokens": "tokens", "base_written": "base wrote", "base_computed": "base computed",
    "draft_written": "draft wrote", "draft_accepted": "accepted", "steps_accepted": "steps kept",
}  # fmt: skip


def kinds() -> tuple[list[Kind], list[Kind]]:
    """(those that count most; those that were found to lose, or whose text is another one's: asked fewer questions)."""

    def plan(draft: str, **options: object) -> SpeculateSteps:
        return SpeculateSteps(draft=draft, **options)  # type: ignore[arg-type]  # names and types as in the table below

    first = [
        OFF,
        Kind("base: token speculation", speculation="auto"),
        *(Kind(f"{draft} alone", model=draft) for draft in DRAFTS),
        Kind("nano: score (default: 4 steps, unsure asks)", plan=plan("nano")),
        Kind("nano: score, lenient (-1.6)", plan=plan("nano", threshold=-1.6)),
    ]
    others = [
        Kind("nano: score, a step at a time", plan=plan("nano", **STEPWISE)),
        Kind("nano: score, with token speculation", plan=plan("nano"), speculation="auto"),
        Kind("nano: score, with token speculation in both", plan=plan("nano"), speculation="auto", speculating=BOTH),
        Kind("draft: score (default)", plan=plan("draft")),
        Kind("draft: score, with token speculation", plan=plan("draft"), speculation="auto"),
        Kind("draft: score, a step at a time", plan=plan("draft", **STEPWISE)),
        Kind("draft: score, rejected steps by base", plan=plan("draft", repair="step", **STEPWISE)),
        Kind("draft: specreason", plan=plan("draft", method="specreason")),
        Kind("draft: glimprouter", plan=plan("draft", method="glimprouter", threshold=0.3)),
        Kind("draft: speculative_thinking", plan=plan("draft", method="speculative_thinking")),
        Kind("draft: entropy", plan=plan("draft", method="entropy", threshold=0.05)),
    ]
    return first, others


def measure(bench: Bench, into: Measured) -> None:
    asked, timed = (draw(bench.seed, bench.levels, n) for n in (bench.problems, bench.timed))
    first, others = kinds()
    answers, times = bench.ask(first, others, [*first, *others], asked, timed)
    rows_s = bench.once("rows_s", lambda: {name: row_s(model) for name, model in bench.models.items()})
    bare = bench.once("bare_s", lambda: {name: bare_s(model) for name, model in bench.models.items()})
    table = _Table(asked, answers, times, rows_s, bare)
    for kind in [*first, *others]:
        table.tell(kind, into)


@dataclass(frozen=True, slots=True)
class _Table:
    asked: Sequence[Question]
    answers: Mapping[str, Outcome]
    times: Mapping[str, Outcome]
    rows_s: Mapping[str, float]
    bare_s: Mapping[str, float]

    def tell(self, kind: Kind, into: Measured) -> None:
        did, off, name = self.answers[kind.name], self.answers[OFF.name], kind.name
        n = len(did.right)
        into.add(name, "problems", n, "problems")
        into.add(name, "accuracy", sum(did.right) / n, "share")
        into.add_points(name, "points_over_off", did.right, off.right[:n])
        into.add(name, "text_tokens", did.tokens / n, "tokens")
        for level in sorted({question.group for question in self.asked}):
            of_level = [right for right, one in zip(did.right, self.asked, strict=False) if one.group == level]
            into.add(name, f"accuracy_{level[-1]}", sum(of_level) / len(of_level), "share")
        draft = kind.plan.draft if isinstance(kind.plan, SpeculateSteps) else "draft"
        small = dict.fromkeys(self.rows_s, 1.0)
        for metric, prices in (("cost", self._token_s()), ("cost_base_10x", {**small, "base": DEARER})):
            into.add(name, metric, did.cost(kind, prices) / sum(off.costs(OFF, prices)[:n]), "ratio")
        self._tell_time(kind, into)
        if isinstance(kind.plan, SpeculateSteps):
            uses = did.uses()
            off_tokens = sum(end.output_tokens for end in off.finished[:n])
            written, drafted = did.written("base"), did.written(draft)
            into.add(name, "base_written", written / n, "tokens")
            into.add(name, "base_computed", did.computed("base") / n, "tokens")
            into.add(name, "draft_written", drafted / n, "tokens")
            into.add(name, "draft_accepted", sum(use.accepted_tokens for use in uses) / n, "tokens")
            steps = sum(use.drafted_steps for use in uses)
            into.add(name, "steps_accepted", sum(use.accepted_steps for use in uses) / max(1, steps), "share")
            into.add(name, "speedup_10x", DEARER * off_tokens / (DEARER * written + drafted), "ratio")

    def _tell_time(self, kind: Kind, into: Measured) -> None:
        did, off, name = self.times[kind.name], self.times[OFF.name], kind.name
        into.add(name, "problems_timed", len(did.right), "problems")
        into.add(name, "cpu_speedup", off.cpu_s / did.cpu_s, "ratio")
        into.add(name, "wall_speedup", off.wall_s / did.wall_s, "ratio")
        if isinstance(kind.plan, SpeculateSteps):
            token_s = self._token_s()
            strict_s = {**self.bare_s, "base": token_s["base"]}
            for bound, each_s in (("bound", token_s), ("strict_bound", strict_s)):
                bound_s = sum(
                    did.written(model) * each_s[model] + max(0, _rows_beyond(did, model)) * self.rows_s[model]
                    for model in ("base", kind.plan.draft)
                )
                into.add(name, bound, off.cpu_s / bound_s, "ratio")
                into.add(name, f"of_the_{bound}", bound_s / did.cpu_s, "ratio")

    def _token_s(self) -> dict[str, float]:
        """What a token of each model costs alone, one answer at a time."""
        alone = {"base": OFF.name, **{draft: f"{draft} alone" for draft in DRAFTS}}
        return {model: self.times[name].cpu_s / self.times[name].tokens for model, name in alone.items()}


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


def bare_s(model: LocalModel, *, tokens: int = 40) -> float:
    """What a token costs that is written within a step; the best of several."""
    kv = new_kv(model, 1 << 26)
    runner = Runner(model, kv)
    slot = kv.open(128)
    runner.run([Segment(slot, 0, list(range(48)), 1)])
    best = float("inf")
    for _ in range(20):
        greedy = runner.greedy(slot, 48 + tokens)
        if greedy is None:
            raise RuntimeError("this machine has no kernels of ours; the strict bound needs them")
        began, token = time.process_time(), 0
        for _ in range(tokens):
            token = greedy.after(token).token
        best = min(best, (time.process_time() - began) / tokens)
    return best
