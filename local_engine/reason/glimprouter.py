"""GlimpRouter: the entropy of a step's first token says who writes the step.

Zeng et al. 2026, arXiv 2601.05110: "the difficulty of a reasoning step can be inferred from its very first token", so
the small model "generates only the first token of each reasoning step and routes the step to a larger model only when
the initial token entropy exceeds a threshold". As in their code, the entropy is that of the twenty likeliest tokens,
renormalised, in nats; the token is thrown away where the large model writes, and the large model always answers.
Nothing is verified. A token of white space alone tells nothing: the next one is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from local_engine.reason.method import KEEP, NO_FLOOR, Do, Move, Opinion
from local_engine.reason.steps import Boundary

THRESHOLD: Final = 0.95
GLIMPSE: Final = 20
"""Tokens whose probabilities are looked at."""


@dataclass(slots=True)
class GlimpRouter:
    threshold: float = THRESHOLD
    floor: float = NO_FLOOR
    answers: bool = False
    _first: bool = True

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        first, self._first = self._first, boundary is Boundary.STEP
        if boundary in (Boundary.CLOSED, Boundary.TURN):
            return Move(Do.HAND_OVER, take_back=boundary is Boundary.TURN)
        if not first:
            return KEEP
        if not text.strip():
            self._first = True
            return KEEP
        if entropy_of(said.top) >= self.threshold:
            return Move(Do.HAND_OVER, take_back=1)
        return KEEP

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        return True

    def rated(self, rating: float) -> bool:
        return True

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        self._first = boundary is Boundary.STEP
        return self._first


def entropy_of(top: Sequence[tuple[int, float]]) -> float:
    """Of these tokens' log-probabilities alone, made to sum to one, in nats."""
    shares = [math.exp(logprob) for _, logprob in top]
    total = sum(shares)
    return -sum(share / total * math.log(share / total) for share in shares if share > 0) if total > 0 else 0.0
