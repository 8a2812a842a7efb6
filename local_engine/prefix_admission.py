"""Whether a prefix store should take in more: not where all that it had went unused.

Copying keys and values out costs 1 to 2 % of computing them, which is lost where nobody reads them again. So a store
rests once blocks of its whole size were evicted and none was hit for the first time meanwhile: it keeps what it has,
and takes in only what is sure to be read again. It wakes when a prompt comes that it would have had something of, as
the names of what it did not take in tell, or when a block is hit for the first time.

Bimodal insertion (Qureshi et al., "Adaptive Insertion Policies for High Performance Caching", ISCA 2007) lets in every
32nd instead, and learns of a change as late; a prompt is long enough to pay for one name of 32 bytes.
"""


class Admission:
    """For a store of `bytes_limit` bytes; every size is in bytes."""

    def __init__(self, bytes_limit: int) -> None:
        self._limit = bytes_limit
        self._unused = 0
        """Evicted since a block was last hit for the first time."""
        self._missed: dict[bytes, int] = {}
        """The first block that each prompt lacked, and what had been left out by then; the oldest first."""
        self._left_out = 0

    @property
    def resting(self) -> bool:
        return self._unused > self._limit

    def evicted(self, size: int) -> None:
        self._unused += size

    def used(self) -> None:
        """A block was hit for the first time."""
        self._unused = 0
        self._missed.clear()

    def missed(self, first: bytes, size: int) -> None:
        """While it rests: a prompt lacks blocks of `size`, the first of which has this digest."""
        while self._missed and self._left_out - next(iter(self._missed.values())) > self._limit:
            del self._missed[next(iter(self._missed))]  # it would have been evicted by now
        if first in self._missed:
            self.used()
            return
        self._missed[first] = self._left_out
        self._left_out += size
