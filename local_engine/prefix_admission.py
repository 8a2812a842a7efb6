"""Whether a prefix store should take in more: not where what it takes in goes unused.

Copying keys and values out costs 1 to 2 % of computing them, which is lost where nobody reads them again. So a store
rests once blocks of its whole size were evicted before they were ever hit, beyond what hits have paid for: it keeps
what it has, and takes in only what is sure to be read again. A block that is hit for the first time has saved what
copying fifty costs: what went unused until then is forgiven, and as much may go unused after it. A store that rests
wakes when one is, or when a prompt comes that it would have had something of, as the names of what it did not take in
tell: that counts as the hit that it would have been. What it takes in while it rests says nothing, hit or not.

Bimodal insertion (Qureshi et al., "Adaptive Insertion Policies for High Performance Caching", ISCA 2007) lets in every
32nd instead, and learns of a change as late; a prompt is long enough to pay for one name of 32 bytes.
"""

from typing import Final

_WORTH: Final = 50
"""Blocks whose copying costs what computing one does."""


class Admission:
    """For a store of `bytes_limit` bytes; every size is in bytes."""

    def __init__(self, bytes_limit: int) -> None:
        self._limit = bytes_limit
        self._unused = 0
        """Evicted before it was hit, since the last first hit; below 0: what hits have paid for and was not evicted."""
        self._missed: dict[bytes, tuple[int, int]] = {}
        """The first block that each prompt lacked: what had been left out by then, and what it lacked. Oldest first."""
        self._left_out = 0

    @property
    def resting(self) -> bool:
        return self._unused > self._limit

    def evicted(self, size: int) -> None:
        """Blocks that were never hit had to go for others."""
        self._unused += size

    def used(self, size: int) -> None:
        """Blocks were hit for the first time, or would have been."""
        self._unused = max(min(self._unused, 0) - _WORTH * size, -_WORTH * self._limit)
        self._missed.clear()

    def missed(self, first: bytes, size: int) -> None:
        """While it rests: a prompt lacks blocks of `size`, the first of which has this digest."""
        while self._missed and self._left_out - next(iter(self._missed.values()))[0] > self._limit:
            del self._missed[next(iter(self._missed))]  # it would have been evicted by now
        if first in self._missed:
            self.used(min(size, self._missed[first][1]))
            return
        self._missed[first] = self._left_out, size
        self._left_out += size
