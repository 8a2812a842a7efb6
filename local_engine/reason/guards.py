"""Against thoughts that come to no end: steps that repeat, and doubts without end. No torch here.

SpecReason's code stops at a step equal to the one before it; a right step may come twice, in a recheck, so it takes
one more here, and cycles of a few steps count too.
"""

import re
from collections import deque
from typing import Final

CYCLE: Final = 4
ROUNDS: Final = 3
MOST_REFLECTIONS: Final = 32
_REFLECTS: Final = re.compile(rb"^\W*(wait|hmm|alternatively|hold on|but wait|actually)\b", re.IGNORECASE)


class LoopGuard:
    """Reads the steps of one thought."""

    def __init__(self) -> None:
        self._steps: deque[bytes] = deque(maxlen=CYCLE * ROUNDS)
        self._reflections = 0

    def read(self, step: bytes) -> str:
        """Why the thought should be closed after this step, in a word; empty when it should not."""
        words = b" ".join(step.split())
        self._steps.append(words)
        self._reflections += bool(_REFLECTS.match(words))
        if self._reflections > MOST_REFLECTIONS:
            return "reflections"
        return "repeats" if any(self._cycles(length) for length in range(1, CYCLE + 1)) else ""

    def _cycles(self, length: int) -> bool:
        steps = list(self._steps)[-length * ROUNDS :]
        return len(steps) == length * ROUNDS and all(step == steps[at % length] for at, step in enumerate(steps))
