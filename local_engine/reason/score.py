"""Judge a step by the log-probabilities that the base model gives to its tokens, in one pass over them.

SpecReason (Pan et al. 2025, arXiv 2504.07891) accepts a step by a rating that the base model is asked for. Where a
model cannot rate, what it would have written itself still tells right from wrong: on the bundled models the lowest
log-probability of a step's tokens does so with AUC 1.00, a rating with 0.60. A step is accepted if none of its tokens
is less probable than the threshold; of a rejected step what comes before the first such token is kept, as those tokens
passed the same test. The default keeps what is more probable than not: that is the base model's own first choice, so at
temperature 0 the text is the one that it writes alone. A lower threshold accepts other words for it. With `unsure`, the
draft stops by itself before a token that it finds improbable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from local_engine.reason.method import JUDGE, WRITE, Do, Move, Opinion
from local_engine.reason.steps import Boundary

THRESHOLD: Final = -0.69


@dataclass(slots=True)
class Scored:
    floor: float = THRESHOLD
    unsure: float | None = None
    lookahead: int = 1
    repair: Literal["token", "step"] = "token"
    answers: bool = True
    _steps: int = 0

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        if boundary is Boundary.TURN or (self.unsure is not None and said.logprob < self.unsure):
            self._steps = 0
            return Move(Do.JUDGE, take_back=1)
        self._steps += boundary in (Boundary.STEP, Boundary.CLOSED)
        if self._steps >= self.lookahead:
            self._steps = 0
            return JUDGE
        return WRITE

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        return True

    def rated(self, rating: float) -> bool:
        return True

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        return self.repair == "token" or boundary is not Boundary.INSIDE
