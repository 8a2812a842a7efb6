"""What a step meant for one sequence: what its owner is told."""

from bisect import bisect_right
from dataclasses import dataclass, field

from torch import Tensor

from local_engine.sampler import Choice
from local_engine.sequence import Scores, Sequence


@dataclass(slots=True)
class Hidden:
    """Hidden states of some of a sequence's tokens."""

    positions: list[int]
    states: Tensor
    """[positions, layers asked for, width], as the model computed them."""

    def split(self, position: int) -> "tuple[Hidden, Hidden]":
        """(those up to `position`, those after it)."""
        at = bisect_right(self.positions, position)
        return Hidden(self.positions[:at], self.states[:at]), Hidden(self.positions[at:], self.states[at:])


@dataclass(slots=True)
class Turn:
    """What a step meant for one sequence."""

    sequence: Sequence
    choices: list[Choice] = field(default_factory=list)
    """Tokens that it wrote: now the end of its `ids`."""
    hidden: Hidden | None = None
    scores: Scores | None = None
    """Of a sequence that scores: it is done, and closed."""
    rested: bool = False
    """It has read all that it was given, and has no sampler."""
    out_of_room: bool = False
    """All KV there is does not hold it; it is computed no further."""
    error: Exception | None = None
    """Its part of the step failed."""
