"""Thoughts written to their end, with the answer that would have been given at each cue: what exits are fitted on.

One line of JSON per question, so that a run that was stopped goes on where it was.
"""

import queue
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

import msgspec

from local_engine.arithmetic import LEVELS, problems
from local_engine.engine import Engine
from local_engine.plan_types import Exit, Plan
from local_engine.reason.answers import answer_class
from local_engine.types import Delta, Event, Failed, Finished, Generate, SamplingParams

_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Question:
    key: str
    """Its own among the questions of a file."""
    text: str
    answer: str
    group: str = ""
    """Of what kind it is; results are told for each."""


class CueOutcome(msgspec.Struct, frozen=True):
    tokens: int
    """Of the thought, before the cue."""
    features: list[float]
    answer: str
    answer_tokens: int
    right: bool
    """Would the request be answered rightly if it were left here?"""


class Trajectory(msgspec.Struct, frozen=True):
    key: str
    group: str
    prompt_tokens: int
    output_tokens: int
    """Without what was tried at the cues."""
    reasoning_tokens: int
    said: str
    right: bool
    """At the thought's own end."""
    cues: list[CueOutcome]


class AskingFailed(RuntimeError):
    """The engine refused a question."""


def is_right(said: str, answer: str) -> bool:
    """Whether they come to the same."""
    return bool(said) and answer_class(said) == answer_class(answer)


def half_of(question: str) -> Literal["fit", "test"]:
    """Exits are fitted and calibrated on one half of all questions, and measured on the other, whatever the seed."""
    return "fit" if blake2b(question.encode(), digest_size=4, person=b"exits").digest()[0] % 2 else "test"


def arithmetic_questions(seed: int, per_level: int, half: Literal["fit", "test"]) -> list[Question]:
    """Held-out problems of every level, of one half: no bundled model was trained on them."""
    found: list[Question] = []
    for level in LEVELS:
        drawn = (one for one in problems(seed, level, 4 * per_level + 40) if half_of(one.question) == half)
        some = [Question(one.question, one.question, str(one.answer), f"level {level}") for one in drawn][:per_level]
        if len(some) < per_level:
            raise ValueError(f"per_level: level {level} has only {len(some)} such problems, not {per_level}")
        found += some
    return found


def kept(path: Path) -> list[Trajectory]:
    """What a file holds so far; a line that was cut off in the middle is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [msgspec.json.decode(line, type=Trajectory) for line in lines if line.endswith(b"\n")]


def trace(
    engine: Engine,
    model: str,
    questions: Sequence[Question],
    path: Path,
    *,
    sampling: SamplingParams,
    layers: Sequence[int] = (),
    together: int = 16,
) -> Generator[Trajectory, None, None]:
    """Ask all questions that `path` does not hold yet, `together` at a time, and add each trajectory to it.

    Raises AskingFailed where the engine refuses one.
    """
    known = {trajectory.key for trajectory in kept(path)}
    asked = Exit(rule="trace", layers=tuple(layers))
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_the_line(path)
    with path.open("ab") as file:
        for question, said, end in ask(
            engine, model, [one for one in questions if one.key not in known], sampling, asked, together=together
        ):
            trajectory = _trajectory(question, said, end)
            file.write(msgspec.json.encode(trajectory) + b"\n")
            file.flush()
            yield trajectory


def ask(
    engine: Engine,
    model: str,
    questions: Sequence[Question],
    sampling: SamplingParams,
    plan: Plan | None = None,
    *,
    together: int = 16,
) -> Iterator[tuple[Question, str, Finished]]:
    """(question, the answer's content, its end) as they end. Raises AskingFailed where the engine refuses one."""
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(arrived.put)
    running: dict[int, tuple[Question, list[str]]] = {}
    waiting = list(enumerate(questions))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < together:
                id, question = waiting.pop()
                running[id] = question, []
                messages = msgspec.json.encode([{"role": "user", "content": question.text}])
                link.submit(Generate(id, model, messages, sampling, plan=plan))
            for event in arrived.get():
                if isinstance(event, Failed):
                    raise AskingFailed(f"{running[event.id][0].text!r}: {event.message}")
                if isinstance(event, Delta):
                    running[event.id][1].append(event.content)
                elif isinstance(event, Finished):
                    question, pieces = running.pop(event.id)
                    yield question, "".join(pieces), event
    finally:
        link.close()


def _trajectory(question: Question, said: str, end: Finished) -> Trajectory:
    assert end.plan is not None, "every exit has its use told"
    cues = [
        CueOutcome(
            cue.tokens,
            [round(value, _DIGITS) for value in cue.features],
            cue.answer,
            cue.answer_tokens,
            is_right(cue.answer, question.answer),
        )
        for cue in end.plan.cues
    ]
    return Trajectory(
        question.key,
        question.group,
        end.input_tokens,
        end.output_tokens - end.plan.discarded_tokens,
        end.reasoning_tokens - end.plan.discarded_tokens,
        said,
        end.finish_reason == "stop" and is_right(said, question.answer),
        cues,
    )


def _end_the_line(path: Path) -> None:
    """What a run that was killed left of its last line is cut off."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
