"""Problems answered by an engine under one plan after the other: what was right, written, read and spent.

Synthetic arithmetic throughout: the bundled models can do nothing else. Kinds take turns, a few problems each, so that
whatever else the machine does falls on all of them alike.
"""

import gc
import json
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from local_engine.arithmetic import Problem, problems
from local_engine.config import locate
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.spec.build import speculators
from local_engine.types import Delta, Effort, Failed, Finished, Generate, Plan, PlanUse, SamplingParams

NAMES: Final = ("nano", "draft", "base")
CHUNK: Final = 8
"""Problems of one turn, per answer that runs at the same time."""
READ_PRICE: Final = 0.2
"""What reading a token costs of what writing one does: about what providers charge."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to answer."""

    name: str
    model: str = "base"
    plan: Plan | None = None
    speculation: str = "off"
    """Of tokens, in the models named by `speculating`."""
    speculating: tuple[str, ...] = ("base",)
    effort: Effort = "low"


@dataclass(slots=True)
class Outcome:
    """What became of one kind's answers; one entry per problem."""

    right: list[bool] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Of the texts."""
        return sum(finished.output_tokens for finished in self.finished)

    def uses(self) -> list[PlanUse]:
        return [finished.plan for finished in self.finished if finished.plan is not None]

    def written(self, model: str) -> int:
        """Tokens that this model wrote, kept or not."""
        return sum(use.output_tokens for did in self.uses() for use in did.models if use.model == model)

    def computed(self, model: str) -> int:
        return sum(use.computed_tokens for did in self.uses() for use in did.models if use.model == model)

    def cost(self, kind: Kind, prices: Mapping[str, float]) -> float:
        """By a price per written token of each model; reading one costs READ_PRICE of it."""
        if kind.plan is None:
            reading = sum(finished.input_tokens for finished in self.finished)
            return prices[kind.model] * (self.tokens + READ_PRICE * reading)
        # A model reads what it wrote as well, which no provider charges for.
        return sum(
            prices[use.model]
            * (
                use.output_tokens
                + READ_PRICE
                * max(use.input_tokens, use.computed_tokens - use.output_tokens)
                * bool(use.computed_tokens)
            )
            for did in self.uses()
            for use in did.models
        )


def load(names: Sequence[str] = NAMES) -> dict[str, LocalModel]:
    for name in names:
        locate(f"bundled/{name}")
    return {name: load_model(name, f"bundled/{name}", dtype="float32", device="cpu") for name in names}


def ask_all(
    models: Mapping[str, LocalModel],
    kinds: Sequence[Kind],
    asked: Sequence[Problem],
    batch: int,
    *,
    max_tokens: int = 500,
) -> dict[str, Outcome]:
    """Every kind answers every problem, `batch` at a time. No prefix is stored: nobody may find what another read."""
    outcomes = {kind.name: Outcome() for kind in kinds}
    engines = {
        kind.name: Engine(
            dict(models),
            max_running=max(8, batch),
            prefix_bytes=0,
            make_speculator=speculators(
                {name: kind.speculation if name in kind.speculating else "off" for name in models}, {}
            ),
        )
        for kind in kinds
    }
    try:
        for kind in kinds:
            engines[kind.name].start()
            _turn(engines[kind.name], kind, asked[:batch], batch, max_tokens, Outcome())  # warm
        for start in range(0, len(asked), CHUNK * batch):
            for kind in kinds:
                chunk = asked[start : start + CHUNK * batch]
                _turn(engines[kind.name], kind, chunk, batch, max_tokens, outcomes[kind.name])
    finally:
        for engine in engines.values():
            engine.stop()
    return outcomes


def _turn(engine: Engine, kind: Kind, asked: Sequence[Problem], batch: int, max_tokens: int, into: Outcome) -> None:
    events: queue.SimpleQueue[list[object]] = queue.SimpleQueue()
    link = engine.connect(events.put)  # type: ignore[arg-type]  # a queue of events is a queue of objects
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, effort=kind.effort)
    said = ["" for _ in asked]
    ends: dict[int, Finished] = {}
    waiting = list(enumerate(asked))

    def submit() -> None:
        if waiting:
            id, problem = waiting.pop(0)
            messages = json.dumps([{"role": "user", "content": problem.question}]).encode()
            link.submit(Generate(id, kind.model, messages, sampling, plan=kind.plan))

    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(batch):
        submit()
    while len(ends) < len(asked):
        for event in events.get(timeout=600):
            if isinstance(event, Delta):
                said[event.id] += event.content
            elif isinstance(event, Finished):
                ends[event.id] = event
                submit()
            elif isinstance(event, Failed):
                raise RuntimeError(f"{kind.name}: {event.message}")
    into.cpu_s += time.process_time() - cpu
    into.wall_s += time.perf_counter() - wall
    link.close()
    for at, problem in enumerate(asked):
        into.right.append(said[at].strip() == f"The answer is {problem.answer}.")
        into.finished.append(ends[at])


def draw(seed: int, levels: Sequence[int], n: int) -> list[Problem]:
    """`n` held-out problems of each level, levels in turn."""
    by_level = [problems(seed, level, n) for level in levels]
    return [problem for group in zip(*by_level, strict=True) for problem in group]
