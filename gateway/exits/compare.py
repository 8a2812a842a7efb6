"""Ways to leave thoughts, side by side on the same questions: accuracy, tokens, time, and what was lost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from local_engine.engine import Engine
from local_engine.plan_types import Exit, Plan
from local_engine.reason.trajectories import Question, ask, is_right
from local_engine.types import Effort, SamplingParams

CHUNK = 60
"""Questions that each method is asked before the next one has its turn, so that a slow minute hits all alike."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer."""

    plan: Plan | None = None
    effort: Effort | None = None
    """None: as the others."""
    hint: str = ""
    """What is added to the question."""
    temperature: float | None = None
    """None: as the others."""


METHODS: Mapping[str, Method] = {
    "leave it off": Method(),
    "probe, delta 0.01": Method(Exit(delta=0.01)),
    "probe, delta 0.05": Method(Exit(delta=0.05)),
    "probe, delta 0.1": Method(Exit(delta=0.1)),
    "probe, delta 0.05, 95%": Method(Exit(delta=0.05, form="high_probability")),
    "probe, delta 0.05, per event": Method(Exit(delta=0.05, form="per_event")),
    "always at the cue": Method(Exit(rule="cue")),
    "momentum (MUR)": Method(Exit(rule="momentum")),
    "redundancy (TrimR)": Method(Exit(rule="redundancy")),
    "convergence": Method(Exit(rule="convergence")),
    "budget (Plan-and-Budget)": Method(Exit(rule="budget")),
    "hint: Be brief.": Method(hint=" Be brief."),
    "low effort": Method(effort="low"),
}


@dataclass(slots=True)
class Tally:
    """What a method did, question by question, in the order asked."""

    right: dict[str, bool] = field(default_factory=dict)
    left: dict[str, bool] = field(default_factory=dict)
    output_tokens: int = 0
    discarded_tokens: int = 0
    samples: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """A method beside leaving thoughts alone. Intervals are of 95%."""

    name: str
    n: int
    accuracy: tuple[float, float, float]
    gain: tuple[float, float, float]
    """Accuracy above that of whole thoughts, on the same questions."""
    tokens: float
    """Per question, with what was thrown away."""
    tokens_saved: float
    discarded: float
    cpu_saved: float
    wall_saved: float
    left: float
    risk: float
    """Share of questions that were left early and answered wrongly."""
    harm: float
    """Of them, those that whole thoughts get right."""
    samples: float
    """Drawn per question by a vote."""


def compare(
    engine: Engine,
    model: str,
    questions: Sequence[Question],
    sampling: SamplingParams,
    methods: Mapping[str, Method] = METHODS,
    *,
    together: int = 16,
    progress: Callable[[int], None] = lambda asked: None,
) -> list[Row]:
    """The first method is what the others are measured against. `progress` hears of every answer."""
    tallies = {name: Tally() for name in methods}
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        for name, method in methods.items():
            _run(engine, model, chunk, sampling, method, tallies[name], together, progress)
    names = list(methods)
    keys = [question.key for question in questions]
    return [_row(name, tallies[name], tallies[names[0]], keys) for name in names]


def _run(
    engine: Engine,
    model: str,
    questions: Sequence[Question],
    sampling: SamplingParams,
    method: Method,
    tally: Tally,
    together: int,
    progress: Callable[[int], None],
) -> None:
    asked = [replace(one, text=one.text + method.hint) for one in questions]
    ours = msgspec.structs.replace(
        sampling,
        effort=method.effort or sampling.effort,
        temperature=sampling.temperature if method.temperature is None else method.temperature,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    for question, said, end in ask(engine, model, asked, ours, method.plan, together=together):
        tally.right[question.key] = end.finish_reason == "stop" and is_right(said, question.answer)
        by_rule = isinstance(method.plan, Exit) and end.plan is not None and end.plan.closed_by == method.plan.rule
        tally.left[question.key] = by_rule  # not by a limit or a loop, which no rule promises anything of
        tally.output_tokens += end.output_tokens
        tally.samples += len(end.plan.samples) if end.plan is not None else 0
        tally.discarded_tokens += end.plan.discarded_tokens if end.plan is not None else 0
        progress(1)
    tally.wall_s += time.perf_counter() - wall
    tally.cpu_s += time.process_time() - cpu


def _row(name: str, tally: Tally, base: Tally, keys: Sequence[str]) -> Row:
    n = len(keys)
    right = np.array([tally.right[key] for key in keys], np.float64)
    whole = np.array([base.right[key] for key in keys], np.float64)
    left = np.array([tally.left[key] for key in keys])
    return Row(
        name,
        n,
        _bootstrap(right),
        _bootstrap(right - whole),
        tally.output_tokens / n,
        1 - tally.output_tokens / base.output_tokens,
        tally.discarded_tokens / n,
        1 - tally.cpu_s / base.cpu_s,
        1 - tally.wall_s / base.wall_s,
        float(left.mean()),
        float((left * (1 - right)).mean()),
        float((left * (1 - right) * whole).mean()),
        tally.samples / n,
    )


def _bootstrap(values: Any, resamples: int = 1000) -> tuple[float, float, float]:
    """(mean, 2.5%, 97.5%) over resamples of the questions."""
    rng = np.random.default_rng(0)
    means = np.array([rng.choice(values, len(values)).mean() for _ in range(resamples)])
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
