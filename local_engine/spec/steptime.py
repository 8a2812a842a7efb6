"""t(rows): how long a step over so many rows takes, measured at start and followed while serving."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

_KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_SHARED_RATE = 0.1  # of a surprise, how much moves the whole curve
_OWN_RATE = 0.2  # and how much moves its own knots at least; more while little is known of them
_MEASURED_WEIGHT = 4.0  # a calibration counts for as many steps
_CLIP = math.log(2)  # no single step counts for more than twice or half of what was expected: machines hiccup
_PLAIN_RATE = 0.2  # how fast the time of plain steps is followed
_FRESH_STEPS = 128  # plain steps that were timed longer ago, or less than this often, are worth another look
_FRESH_TIMES = 3
_ROWS_FOR_FREE = 16.0  # where nothing was measured: rows that cost as much as starting a step


class StepTime:
    """Seconds of a step by its rows (tokens of all sequences together) and by how many sequences they belong to.

    A curve over rows for each doubling of the number of sequences: thirty-two rows of one sequence read one context,
    those of thirty-two sequences read as many. What is measured moves the knots next to it, and the whole curve with
    them: a machine that is slow today is slow at every size.
    """

    def __init__(self, measured: Mapping[tuple[int, int], float] | None = None) -> None:
        """`measured`: seconds by (rows, sequences), from a calibration. Without it the first steps set the scale."""
        self._curves: dict[int, _Curve] = {}
        self._plain: dict[int, float] = {}
        self._timed: dict[int, tuple[int, int]] = {}  # how often plain steps were, and when the last one was
        by_bucket: dict[int, dict[int, float]] = {}
        for (rows, sequences), seconds in (measured or {}).items():
            by_bucket.setdefault(sequences.bit_length(), {})[rows] = seconds
        for bucket, points in by_bucket.items():
            logs = [math.log(_interpolate(sorted(points.items()), rows)) for rows in _KNOTS]
            self._curves[bucket] = _Curve(logs, _MEASURED_WEIGHT)

    def __call__(self, rows: int, sequences: int = 1) -> float:
        plain_s = self._plain.get(rows) if rows == sequences else None
        return self._curve(sequences)(rows) if plain_s is None else plain_s

    def observe_plain(self, sequences: int, seconds: float) -> None:
        """A step of one row for each sequence took so long, among others of its kind.

        It is known apart from the curve, which all other steps move too: what drafts gain is measured by it.
        """
        self.observe(sequences, seconds, sequences)
        times, _ = self._timed.get(sequences, (0, 0))
        self._timed[sequences] = times + 1, self._curve(sequences).steps
        before = self._plain.get(sequences, seconds)
        self._plain[sequences] = before + _PLAIN_RATE * (min(seconds, 2 * before) - before)

    def observe(self, rows: int, seconds: float, sequences: int = 1, *, mixed: bool = False) -> None:
        """A step over so many rows took so long. `mixed`: prompts were among them; that tells of this size alone."""
        self._curve(sequences).observe(rows, seconds, mixed=mixed)

    def fresh(self, sequences: int) -> bool:
        """Whether plain steps of so many sequences were timed lately, and often enough."""
        times, seen = self._timed.get(sequences, (0, 0))
        return times >= _FRESH_TIMES and self._curve(sequences).steps - seen < _FRESH_STEPS

    def _curve(self, sequences: int) -> "_Curve":
        bucket = sequences.bit_length()
        if bucket not in self._curves:
            nearest = min(self._curves, key=lambda known: abs(known - bucket), default=None)
            self._curves[bucket] = _Curve(None if nearest is None else self._curves[nearest].logs)
        return self._curves[bucket]


class _Curve:
    def __init__(self, logs: list[float] | None, weight: float = 0.0) -> None:
        self._known = logs is not None
        self._seconds: list[float] = []  # at each knot; empty when `logs` have changed
        self.logs = list(logs or (math.log(1e-3 * (1 + rows / _ROWS_FOR_FREE)) for rows in _KNOTS))
        """Natural logarithm of the seconds at each knot."""
        self._weights = [weight] * len(_KNOTS)  # steps that were timed near each knot
        self.steps = 0

    def __call__(self, rows: int) -> float:
        if not self._seconds:
            self._seconds = list(map(math.exp, self.logs))
        at, share = _between(rows)
        if at + 1 == len(_KNOTS):
            return self._seconds[at] * rows / _KNOTS[at]
        return (1 - share) * self._seconds[at] + share * self._seconds[at + 1]

    def observe(self, rows: int, seconds: float, *, mixed: bool) -> None:
        surprise = math.log(max(seconds, 1e-9) / self(rows))
        clipped = max(-_CLIP, min(_CLIP, surprise))
        at, share = _between(rows)
        self.steps += 1
        shared = 0.0 if mixed else clipped * _SHARED_RATE if self._known else surprise
        self._known = True
        moves = [shared] * len(_KNOTS)
        for knot, near in ((at, 1 - share), (at + 1, share)):
            if near > 0:
                before = self._weights[knot]
                self._weights[knot] += near
                moves[knot] = max(near * max(_OWN_RATE, 1 / (2 + before)) * clipped, shared, key=abs)
        self.logs = [log + move for log, move in zip(self.logs, moves, strict=True)]
        for knot in reversed(range(len(self.logs) - 1)):
            self.logs[knot] = min(self.logs[knot], self.logs[knot + 1])  # fewer rows never take longer
        self._seconds = []


@lru_cache(maxsize=1 << 13)
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
