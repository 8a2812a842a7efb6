"""How far a drafting model goes, and what its passes take."""

from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

from local_engine.sequence import Sequence
from local_engine.spec.acceptance import Acceptance
from local_engine.spec.draft import Draft, Weigh, Worth
from local_engine.spec.steptime import StepTime

_CAUTION = 0.5
"""Of the probability below which a pass does not pay, this is the floor of who drafts: it may be modest."""


@dataclass(slots=True)
class Watched:
    """Asks on, and notes when drafting began: before that a prompt may have been read."""

    weigh: Weigh
    clock: Callable[[], float]
    asked: float
    began: float = 0.0
    made: int | None = None
    """Passes that were made by then; None: it has not begun."""

    @property
    def floor(self) -> float:
        return self.weigh.floor

    def begin(self, made: int) -> None:
        self.began, self.made = self.clock(), made

    def __call__(self, sequences: Sized[Sequence], grades: Sized[Sized[int]]) -> Worth:
        return self.weigh(sequences, grades)

    @property
    def read_s(self) -> float:
        """What reading took."""
        return (self.clock() if self.made is None else self.began) - self.asked

    def pass_s(self, drafts: Sized[Draft], length: int) -> float | None:
        """What a drafting pass took, of those that led to `drafts` of at most `length` tokens."""
        if self.made is None:
            return None
        if self.made:
            passes: float = min(length, 1 + max(len(draft.tokens) for draft in drafts)) - self.made
        else:
            passes = sum(len(draft.tokens) for draft in drafts) / len(drafts)
        return (self.clock() - self.began) / passes if passes else None


@dataclass(slots=True)
class Weigher:
    """Tokens are drafted while their rows are worth verifying, and passes made while they pay for themselves."""

    name: str
    acceptance: Acceptance
    step_time: StepTime
    token_s: float
    pass_s: float
    count: int
    other_rows: int
    _so_far: list[float] = field(default_factory=list)

    @property
    def floor(self) -> float:
        rows = self.other_rows + self.count
        row_s = self.step_time(rows + self.count, self.count) - self.step_time(rows, self.count)
        return _CAUTION * (self.pass_s + row_s) / (self.count * self.token_s)

    def begin(self, made: int) -> None:
        """Nobody counts here."""

    def __call__(self, sequences: Sized[Sequence], grades: Sized[Sized[int]]) -> Worth:
        pairs = zip(sequences, grades, strict=True)
        next_ones = [self.acceptance.chances(sequence, self.name, chain[-1:])[0] for sequence, chain in pairs]
        before = self._so_far or [1.0] * len(next_ones)
        self._so_far = [chance * one for chance, one in zip(before, next_ones, strict=True)]
        rows = self.other_rows + self.count * len(grades[0])
        row_s = self.step_time(rows + self.count, self.count) - self.step_time(rows, self.count)
        gain_s = sum(self._so_far) * self.token_s - row_s
        if gain_s <= 0:
            return Worth.LEAVE
        return Worth.GO_ON if gain_s > self.pass_s else Worth.LAST
