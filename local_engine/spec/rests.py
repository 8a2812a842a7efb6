"""When drafts are looked for: in every step while they pay, and ever more rarely while they do not.

A step in between is plain decoding: it is not looked at, and nothing is learned of it. A few are timed, never the first
of a rest: right after drafts a plain step takes up to a quarter longer than among its like.
"""

from dataclasses import dataclass
from typing import Final

_IDLE_LOOKS: Final = 4
"""Looks in a row that find nothing worth drafting, after which there is a rest."""
_IDLE_STEPS: Final = 16
_MOST_IDLE_STEPS: Final = 64
"""Each look that finds nothing either doubles the rest, up to this; one that costs much makes it longer."""
_LOOK_SHARE: Final = 0.005
"""Of the time that looks may take where they find nothing."""
MOST_REST: Final = 512
_TIMED_STEPS: Final = 128
"""Of a rest one in so many is timed, and the last."""
_SHORT_REST: Final = 3


@dataclass(slots=True)
class _Rest:
    left: int = 0
    """Steps without a look to come."""
    taken: int = 0
    """And those since the last one."""
    fruitless: int = 0
    """Looks in a row that found nothing."""
    pay: bool = False
    """The last drafts gained something."""


class Rests:
    """Rests of one model, each for its own doubling of the running sequences: where one does not pay, another may."""

    def __init__(self) -> None:
        self._of: dict[int, _Rest] = {}
        self._now = _Rest()
        self.timed = False
        """Whether this step of a rest is one to be timed."""

    def rests(self, running: int) -> bool:
        """Whether the next step, of so many sequences, is one without a look. All else is said of its size."""
        bucket = running.bit_length()
        rest = self._now = self._of.get(bucket) or self._of.setdefault(bucket, _Rest())
        if not rest.left:
            return False
        rest.left -= 1
        rest.taken += 1
        self.timed = rest.taken > 1 and not rest.left % _TIMED_STEPS
        return True

    @property
    def pay(self) -> bool:
        return self._now.pay

    def taken(self) -> int:
        """Steps of rest that nobody has accounted for yet."""
        taken, self._now.taken = self._now.taken, 0
        return taken

    def pause(self) -> None:
        """Let nobody look for as long as it takes to time plain steps."""
        self._now.left = _SHORT_REST

    def rest(self, steps: float) -> None:
        """Let nobody look for so long, rounded."""
        self._now.left = max(_IDLE_STEPS, min(MOST_REST, int(steps)))

    def looked(self, cost_steps: float, *, found: bool, gained: bool) -> None:
        """A look, which took as long as so many plain steps, found drafts or not, and they gained something or not."""
        rest = self._now
        rest.pay = found and gained
        if rest.pay:
            rest.fruitless = 0
        elif not found:
            rest.fruitless += 1
        if rest.fruitless >= _IDLE_LOOKS:
            doubled = _IDLE_STEPS << min(rest.fruitless - _IDLE_LOOKS, 8)
            rest.left = max(min(doubled, _MOST_IDLE_STEPS), min(MOST_REST, int(cost_steps / _LOOK_SHARE)))
