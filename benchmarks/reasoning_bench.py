"""What every section of the reasoning benchmark asks with: all questions for answers, some of them for time."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
from reasoning_run import Kind, Outcome, Run, TimeIsUp

from local_engine.model import LocalModel
from local_engine.reason.trajectories import Question

Part = Literal["answers", "times"]
PART_FOR_OTHERS: Final = 5
"""Kinds that are known to lose, or to write another one's text, are asked one question of so many."""


@dataclass(frozen=True, slots=True)
class Bench:
    models: Mapping[str, LocalModel]
    levels: Sequence[int]
    seed: int
    problems: int
    """Of each level, for what is answered."""
    timed: int
    """Of each level, for time: they are asked one at a time."""
    batch: int
    """Answers at a time where no time is taken: what is answered does not depend on it."""
    folder: Path
    """Where turns are kept."""
    parts: Sequence[Part] = ("answers", "times")
    until: float = float("inf")

    def ask(
        self,
        kinds: Sequence[Kind],
        others: Sequence[Kind],
        timed_kinds: Sequence[Kind],
        asked: Sequence[Question],
        timed: Sequence[Question],
    ) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
        """(what was answered, what time was taken), by the kinds' names.

        `others` are asked a part of the questions only. Raises TimeIsUp where something is missing.
        """
        found: list[dict[str, Outcome]] = []
        parts: list[tuple[Part, int, Sequence[Kind], Sequence[Question]]] = [
            ("answers", self.batch, kinds, asked),
            ("answers", self.batch, others, asked[: len(asked) // PART_FOR_OTHERS]),
            ("times", 1, timed_kinds, timed),
        ]
        for part, batch, ways, questions in parts:
            until = self.until if part in self.parts else float("-inf")
            with suppress(TimeIsUp):
                found.append(Run(self.models, batch, self.seed, self.folder, until).ask_all(ways, questions))
        if len(found) < len(parts):
            raise TimeIsUp
        return found[0] | found[1], found[2]

    def once(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A measurement that is kept like the turns."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.check_time()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(measure()))
        return msgspec.json.decode(path.read_bytes(), type=dict[str, float])

    def all_of(self, measures: Sequence[Callable[[], None]]) -> None:
        """Each of them as far as it comes. Raises TimeIsUp where one is not whole."""
        missing = 0
        for measure in measures:
            try:
                measure()
            except TimeIsUp:
                missing += 1
        if missing:
            raise TimeIsUp

    def check_time(self) -> None:
        """Raises TimeIsUp."""
        if time.monotonic() > self.until:
            raise TimeIsUp
