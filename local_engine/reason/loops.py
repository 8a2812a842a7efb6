"""A guard against thoughts that go round in circles: an endless "Wait, wait, wait", or the same check for ever."""

from collections.abc import Sequence
from typing import Final

LONGEST_PERIOD: Final = 64
ROUNDS: Final = 3
LEAST: Final = 24
"""Tokens that the repetitions have at least, so that a run of equal digits or dots is no loop."""


def goes_round(tokens: Sequence[str], longest: int = LONGEST_PERIOD) -> bool:
    """Whether `tokens` end with the same stretch, of up to `longest` tokens, `ROUNDS` times or more in a row."""
    n = len(tokens)
    for period in range(1, longest + 1):
        span = max((ROUNDS - 1) * period, LEAST)
        if n < span + period:
            break
        if tokens[-1] == tokens[-1 - period] and tokens[n - span :] == tokens[n - span - period : n - period]:
            return True
    return False
