"""SpecReason: the base model rates each of the draft's steps by one digit.

Pan et al. 2025, arXiv 2504.07891: "using a lightweight model to (speculatively) carry out simpler intermediate
reasoning steps and reserving the costly base model only to assess (and potentially correct) the speculated outputs".
As in their code, a step is assessed by one pass over it and one token, a score from 0 to 9, and accepted from 7 on.
A step that is rejected is written by the base model. The rating read here is the expected digit, not the likeliest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from local_engine.reason.method import NO_FLOOR, WRITE, Do, Move, Opinion
from local_engine.reason.steps import Boundary

THRESHOLD: Final = 7.0
RATINGS: Final = 20
"""Tokens among which a rating's digits are looked for, as in SpecReason's code."""


@dataclass(slots=True)
class SpecReason:
    threshold: float = THRESHOLD
    floor: float = NO_FLOOR
    answers: bool = False

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        if boundary is Boundary.STEP:
            return Move(Do.RATE)
        if boundary is Boundary.INSIDE:
            return WRITE
        return Move(Do.HAND_OVER, take_back=1)  # it has no step more: the base model closes the thought, and answers

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        return True

    def rated(self, rating: float) -> bool:
        return rating >= self.threshold

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        return boundary is Boundary.STEP
