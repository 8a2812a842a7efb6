"""What a way of sharing a thought between two models has to decide; `speculate.py` does the rest. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from local_engine.reason.steps import Boundary

NO_FLOOR: Final = -1e9


class Opinion(Protocol):
    """A token and what the model that wrote it (or was asked) thinks of it: `Choice` of the sampler."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def entropy(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...


class Do(Enum):
    """What follows a token that the draft has written."""

    WRITE = "the draft writes on"
    KEEP = "what it wrote is accepted as it is, and it writes on"
    JUDGE = "the base model judges what it wrote"
    RATE = "the base model rates it by a digit"
    HAND_OVER = "what it wrote is accepted, and the base model writes on"


@dataclass(frozen=True, slots=True)
class Move:
    do: Do
    take_back: int = 0
    """So many of the draft's last tokens are dropped first: the base model writes in their place."""


WRITE: Final = Move(Do.WRITE)
KEEP: Final = Move(Do.KEEP)
JUDGE: Final = Move(Do.JUDGE)


class Method(Protocol):
    """One thought's. A base model that judges always writes the token after what it judged: that costs nothing."""

    floor: float
    """A judgement keeps what comes before the first token that is less probable, a natural logarithm."""
    answers: bool
    """Whether the draft writes on after the thought; else the base model answers."""

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        """The draft wrote a token: `text` are its bytes."""
        ...

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        """Of `offered` judged tokens `thought` was kept, with the base model's own view: is that enough of them?

        Where not, all of them are dropped.
        """
        ...

    def rated(self, rating: float) -> bool:
        """The base model gave the steps this many of 9 points: are they accepted?"""
        ...

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        """The base model wrote a token: is it the draft's turn again?"""
        ...
