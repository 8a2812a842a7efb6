"""t(rows): how long a step over so many rows takes, measured at start and followed while serving."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

_KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_RATE = 0.1  # of a surprise, how much moves its own knots; what all steps share moves them all, half as fast
_CLIP = math.log(2)  # no single step counts for more than twice or half of what was expected: machines hiccup
_ROWS_FOR_FREE = 16.0  # where nothing was measured: rows that cost as much as starting a step


class StepTime:
    """Seconds of a step by the number of its rows (tokens of all sequences together).

    A curve through knots, straight between them. What is measured moves the knots next to it, and the whole curve with
    them: a machine that is slow today is slow at every size. Steps grow with context too; the curve follows.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """`measured`: seconds by rows, from a calibration at start. Without it the first steps set the scale."""
        self._log = [math.log(1e-3 * (1 + rows / _ROWS_FOR_FREE)) for rows in _KNOTS]
        self._known = bool(measured)
        if measured:
            self._log = [math.log(_interpolate(sorted(measured.items()), rows)) for rows in _KNOTS]

    def __call__(self, rows: int) -> float:
        at, share = _between(rows)
        if at + 1 == len(_KNOTS):
            return math.exp(self._log[at]) * rows / _KNOTS[at]
        return (1 - share) * math.exp(self._log[at]) + share * math.exp(self._log[at + 1])

    def observe(self, rows: int, seconds: float) -> None:
        """A step over so many rows took so long."""
        surprise = math.log(max(seconds, 1e-9) / self(rows))
        if not self._known:
            self._known = True
            self._log = [log + surprise for log in self._log]
            return
        surprise = max(-_CLIP, min(_CLIP, surprise)) * _RATE
        at, share = _between(rows)
        for knot in range(len(self._log)):
            near = (1 - share) * (knot == at) + share * (knot == at + 1)
            self._log[knot] += surprise * max(near, 0.5)


def _between(rows: int) -> tuple[int, float]:
    """(index of the last knot that is not over `rows`, share of the way to the next one)."""
    at = max(0, bisect_left(_KNOTS, rows + 1) - 1)
    if at + 1 == len(_KNOTS):
        return at, 0.0
    return at, (rows - _KNOTS[at]) / (_KNOTS[at + 1] - _KNOTS[at])


def _interpolate(points: list[tuple[int, float]], rows: int) -> float:
    """Seconds at `rows`, straight between the points, in proportion beyond the last one and flat before the first."""
    if rows <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if rows <= right:
            return low + (high - low) * (rows - left) / (right - left)
    right, high = points[-1]
    return high * rows / right
