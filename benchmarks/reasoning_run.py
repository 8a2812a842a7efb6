"""Questions answered by an engine under one plan after the other: what was right, written, read and spent.

Synthetic arithmetic throughout: the bundled models can do nothing else. Kinds take turns, some questions each, so that
whatever else the machine does falls on all of them alike. Every turn is kept on disk: a run that was stopped, or that
came to the end of its time, goes on where it was.
"""

import gc
import queue
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from local_engine.arithmetic import problems
from local_engine.config import locate
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.plan_types import Plan, PlanUse
from local_engine.reason.artifact import weights_sha256
from local_engine.reason.trajectories import Question, is_right
from local_engine.spec.build import speculators
from local_engine.types import Delta, Effort, Event, Failed, Finished, Generate, SamplingParams

NAMES: Final = ("nano", "draft", "base")
CHUNK: Final = 8
"""Questions of one turn, per answer that runs at the same time."""
READ_PRICE: Final = 0.2
"""What reading a token costs of what writing one does: about what providers charge."""


class TimeIsUp(Exception):
    """The run's time is over before all was asked; what was answered is kept."""


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
    temperature: float = 0.0
    max_tokens: int = 500
    hint: str = ""
    """What is added to the question."""


class Turn(msgspec.Struct):
    """What became of some questions; one entry per question."""

    right: list[bool]
    finished: list[Finished]
    cpu_s: float
    wall_s: float


@dataclass(slots=True)
class Outcome:
    """What became of one kind's answers; one entry per question."""

    right: list[bool] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def add(self, turn: Turn) -> None:
        self.right += turn.right
        self.finished += turn.finished
        self.cpu_s += turn.cpu_s
        self.wall_s += turn.wall_s

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

    def costs(self, kind: Kind, prices: Mapping[str, float]) -> list[float]:
        """Of each answer, by a price per written token of each model; reading one costs READ_PRICE of it."""
        return [_cost(finished, kind, prices) for finished in self.finished]

    def cost(self, kind: Kind, prices: Mapping[str, float]) -> float:
        return sum(self.costs(kind, prices))


def _cost(finished: Finished, kind: Kind, prices: Mapping[str, float]) -> float:
    if kind.plan is None or finished.plan is None:
        return prices[kind.model] * (finished.output_tokens + READ_PRICE * finished.input_tokens)
    # A model reads what it wrote as well, which no provider charges for.
    return sum(
        prices[use.model]
        * (use.output_tokens + READ_PRICE * max(use.input_tokens, use.computed_tokens - use.output_tokens))
        for use in finished.plan.models
        if use.computed_tokens
    )


@dataclass(frozen=True, slots=True)
class Run:
    """How questions are asked: by which models, how many at a time, from what seed, and where turns are kept."""

    models: Mapping[str, LocalModel]
    batch: int
    seed: int
    folder: Path
    until: float = float("inf")
    """`time.monotonic` after which no turn is begun."""

    def ask_all(self, kinds: Sequence[Kind], asked: Sequence[Question]) -> dict[str, Outcome]:
        """Every kind answers every question. Raises TimeIsUp where it is, before all are answered.

        No prefix is stored: nobody may find what another one read.
        """
        outcomes = {kind.name: Outcome() for kind in kinds}
        engines: dict[str, Engine] = {}
        with ExitStack() as running:
            for start in range(0, len(asked), CHUNK * self.batch):
                chunk = asked[start : start + CHUNK * self.batch]
                for kind in kinds:
                    path = self.folder / f"{self._digest(kind, chunk)}.json"
                    if path.exists():
                        turn = msgspec.json.decode(path.read_bytes(), type=Turn)
                    else:
                        if time.monotonic() > self.until:
                            raise TimeIsUp
                        if kind.name not in engines:
                            engines[kind.name] = self._engine(kind)
                            running.callback(engines[kind.name].stop)
                            self._turn(engines[kind.name], kind, chunk[: self.batch])  # warm
                        turn = self._turn(engines[kind.name], kind, chunk)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.with_suffix(".new").write_bytes(msgspec.json.encode(turn))
                        path.with_suffix(".new").rename(path)
                    outcomes[kind.name].add(turn)
        return outcomes

    def _digest(self, kind: Kind, chunk: Sequence[Question]) -> str:
        """Of all that a turn's result depends on but the code."""
        plan = msgspec.json.encode(kind.plan).decode()
        asked = [question.text for question in chunk]
        told = repr((replace(kind, name="", plan=None), plan, asked, self.batch, self.seed, _weights()))
        return blake2b(told.encode(), digest_size=12).hexdigest()

    def _engine(self, kind: Kind) -> Engine:
        speculating = {name: kind.speculation if name in kind.speculating else "off" for name in self.models}
        engine = Engine(
            dict(self.models),
            max_running=16 * self.batch,  # a vote runs several
            prefix_bytes=0,
            make_speculator=speculators(speculating, {}),
        )
        engine.start()
        return engine

    def _turn(self, engine: Engine, kind: Kind, asked: Sequence[Question]) -> Turn:
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        link = engine.connect(events.put)
        sampling = SamplingParams(
            temperature=kind.temperature, seed=self.seed, max_tokens=kind.max_tokens, effort=kind.effort
        )
        said = ["" for _ in asked]
        ends: dict[int, Finished] = {}
        waiting = list(enumerate(asked))[::-1]

        def submit() -> None:
            if waiting:
                id, question = waiting.pop()
                messages = msgspec.json.encode([{"role": "user", "content": question.text + kind.hint}])
                link.submit(Generate(id, kind.model, messages, sampling, plan=kind.plan))

        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(self.batch):
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
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        link.close()
        finished = [ends[at] for at in range(len(asked))]
        right = [
            end.finish_reason == "stop" and is_right(answer, question.answer)
            for end, answer, question in zip(finished, said, asked, strict=True)
        ]
        return Turn(right, finished, cpu, wall)


@cache
def _weights() -> str:
    return "".join(weights_sha256(Path(locate(f"bundled/{name}")[0])) for name in NAMES)


def load(names: Sequence[str] = NAMES) -> dict[str, LocalModel]:
    return {name: load_model(name, f"bundled/{name}", dtype="float32", device="cpu") for name in names}


def draw(seed: int, levels: Sequence[int], n: int) -> list[Question]:
    """`n` held-out problems of each level, levels in turn."""
    by_level = [
        [Question(one.question, one.question, str(one.answer), f"level {level}") for one in problems(seed, level, n)]
        for level in levels
    ]
    return [question for group in zip(*by_level, strict=True) for question in group]
