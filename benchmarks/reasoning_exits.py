"""Leaving thoughts early: every method beside leaving it off, and whether the promises hold. Synthetic arithmetic.

High effort, greedy, questions of the half that no artifact was fitted on (`trajectories.half_of`), so that another seed
draws fresh ones. The promises are put to the test on trajectories of those questions: over 200 random halves, each
calibrated on the other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

from measured import Measured
from reasoning_bench import Bench
from reasoning_run import Kind, Outcome

from gateway.exits.compare import METHODS
from gateway.exits.fitting import proofs
from local_engine.engine import Engine
from local_engine.plan_types import Exit
from local_engine.reason.trajectories import Question, arithmetic_questions, kept, trace
from local_engine.types import SamplingParams

DELTAS: Final = (0.01, 0.05, 0.1)
MAX_TOKENS: Final = 600
TRACED: Final = 200
"""Questions of each level on which promises are put to the test, at most."""
OFF: Final = "leave it off"
FIRST: Final = (OFF, "probe, delta 0.05", "probe, delta 0.1")
TIMED: Final = (*FIRST, "probe, delta 0.01", "always at the cue", "momentum (MUR)")
COLUMNS: Final = {
    "accuracy": "right", "points_over_off": "points over off", "tokens": "tokens", "tokens_saved": "tokens saved",
    "cpu_saved": "CPU saved", "wall_saved": "wall saved", "left": "left early", "risk": "and wrong", "harm": "harm",
}  # fmt: skip
PROOF_COLUMNS: Final = {
    "mean_risk": "mean risk", "held": "held", "share_left": "left early", "trajectories": "trajectories",
}  # fmt: skip


def questions(seed: int, levels: Sequence[int], n: int) -> list[Question]:
    """`n` of each level, levels in turn."""
    found = arithmetic_questions(seed, n, "test")
    by_level = [[one for one in found if one.group == f"level {level}"] for level in levels]
    return [one for group in zip(*by_level, strict=True) for one in group]


def kinds() -> list[Kind]:
    return [
        Kind(name, plan=method.plan, effort=method.effort or "high", max_tokens=MAX_TOKENS, hint=method.hint)
        for name, method in METHODS.items()
    ]


def measure(bench: Bench, into: Measured) -> None:
    bench.all_of([partial(_measure, bench, into), partial(_promises, bench, into)])


def _measure(bench: Bench, into: Measured) -> None:
    asked, timed = (questions(bench.seed, bench.levels, n) for n in (bench.problems, bench.timed))
    ways = kinds()
    first, others = ([kind for kind in ways if (kind.name in FIRST) is so] for so in (True, False))
    answers, times = bench.ask(first, others, [kind for kind in ways if kind.name in TIMED], asked, timed)
    for kind in ways:
        tell(kind, answers, OFF, into)
        if kind.name in times:
            tell_time(kind.name, kind.name, times, OFF, into)


def tell(kind: Kind, answers: dict[str, Outcome], off: str, into: Measured) -> None:
    did, whole, name = answers[kind.name], answers[off], kind.name
    n = len(did.right)
    whole_tokens = sum(end.output_tokens for end in whole.finished[:n])
    into.add(name, "accuracy", sum(did.right) / n, "share")
    into.add(name, "problems", n, "problems")
    into.add_points(name, "points_over_off", did.right, whole.right[:n])
    into.add(name, "tokens", did.tokens / n, "tokens")
    into.add(name, "tokens_saved", 1 - did.tokens / whole_tokens, "share")
    if isinstance(kind.plan, Exit):
        # By a limit or a loop: no rule promises anything of those.
        left = [use.closed_by == kind.plan.rule for use in did.uses()]
        spoilt = [one and not right for one, right in zip(left, did.right, strict=True)]
        into.add(name, "left", sum(left) / n, "share")
        into.add(name, "risk", sum(spoilt) / n, "share")
        into.add(name, "harm", sum(one and was for one, was in zip(spoilt, whole.right, strict=False)) / n, "share")


def tell_time(row: str, name: str, times: dict[str, Outcome], off: str, into: Measured) -> None:
    into.add(row, "problems_timed", len(times[name].right), "problems")
    into.add(row, "cpu_saved", 1 - times[name].cpu_s / times[off].cpu_s, "share")
    into.add(row, "wall_saved", 1 - times[name].wall_s / times[off].wall_s, "share")


def _promises(bench: Bench, into: Measured) -> None:
    asked = questions(bench.seed, bench.levels, min(bench.problems, TRACED))
    path, model = bench.folder / "trajectories.jsonl", bench.models["base"]
    if len(kept(path)) < len(asked):
        bench.check_time()
        engine = Engine({"m": model}, max_running=bench.batch, prefix_bytes=0)
        engine.start()
        try:
            think = SamplingParams(temperature=0, effort="high", max_tokens=MAX_TOKENS)
            for _ in trace(engine, "m", asked, path, sampling=think, together=bench.batch):
                bench.check_time()
        finally:
            engine.stop()
    assert model.exits is not None, "one is shipped"
    for proof in proofs(model.exits, kept(path), deltas=DELTAS, fresh=True):
        name = f"promise: {proof['form']}, delta {proof['delta']:g}"
        into.add(name, "mean_risk", proof["mean_risk"], "share")
        into.add(name, "held", proof["held"], "share")
        into.add(name, "share_left", proof["left"], "share")
        into.add(name, "trajectories", proof["trajectories"], "trajectories")
