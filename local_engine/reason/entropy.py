"""Entropy-adaptive decoding: the larger model writes while the smaller one is unsure.

Simonds 2025, arXiv 2502.06833: "dynamically switches between different-sized models based on prediction uncertainty",
"monitoring rolling entropy in model logit distributions", and "accepts controlled output divergence". Two thresholds
instead of one, so that it does not flutter: the base model takes over when the mean entropy of the last tokens is over
the threshold, and gives back when that of its own is under half of it. The token that was over is the base model's.
Nothing is verified.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from local_engine.reason.method import KEEP, NO_FLOOR, Do, Move, Opinion
from local_engine.reason.steps import Boundary

THRESHOLD: Final = 0.15
WINDOW: Final = 8


@dataclass(slots=True)
class EntropySwitch:
    threshold: float = THRESHOLD
    """Nats."""
    window: int = WINDOW
    floor: float = NO_FLOOR
    answers: bool = True
    _last: deque[float] = field(default_factory=deque)

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        if boundary is Boundary.TURN:
            return KEEP
        if self._mean(said.entropy) > self.threshold:
            self._last.clear()
            return Move(Do.HAND_OVER, take_back=1)
        return KEEP

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        return True

    def rated(self, rating: float) -> bool:
        return True

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        if self._mean(said.entropy) >= self.threshold / 2:
            return False
        self._last.clear()
        return True

    def _mean(self, entropy: float) -> float:
        self._last.append(entropy)
        if len(self._last) > self.window:
            self._last.popleft()
        return sum(self._last) / len(self._last)
