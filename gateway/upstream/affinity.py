"""Which replica has seen the start of a prompt: so that it goes where its KV already is, unless too many do.

Prompts are cut into blocks of bytes, small at the start and larger later, and each block's key covers all before it.
Workers hold no tokenizer; prompts with equal bytes up to a block have equal tokens there, but for the last one. A wrong
guess costs a prefill, never an answer, so 32 bits of key are enough.
"""

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

_BOUNDS = (*range(0, 512, 64), *range(512, 4096, 256), *range(4096, 16384, 1024), 16384)
_LATER = 4096
MAX_BLOCKS = 65_536
"""Keys remembered; about 10 MB."""


def block_keys(salt: str, parts: Sequence[bytes | memoryview]) -> list[int]:
    """One key for each whole block of the joined parts, the rest counting as a block."""
    text = b"".join(parts)
    view, size = memoryview(text), len(text)
    bounds = [*(bound for bound in _BOUNDS if bound < size), *range(_BOUNDS[-1] + _LATER, size, _LATER), size]
    keys, key = [], zlib.crc32(salt.encode())
    for start, end in pairwise(bounds):
        key = zlib.crc32(view[start:end], key)
        keys.append(key)
    return keys


class PrefixIndex:
    """Key → the replicas that were sent a prompt with it, least recently used forgotten first."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max = max_blocks
        self._replicas: OrderedDict[int, int] = OrderedDict()  # key → bits of replicas

    def matched(self, keys: Sequence[int], replicas: int) -> list[float]:
        """For each replica, the share of the blocks, from the first on, that it has seen."""
        seen, still = [0] * replicas, (1 << replicas) - 1
        for at, key in enumerate(keys):
            still &= self._replicas.get(key, 0)
            if not still:
                break
            for replica in range(replicas):
                if still >> replica & 1:
                    seen[replica] = at + 1
        return [count / len(keys) if keys else 0.0 for count in seen]

    def saw(self, keys: Sequence[int], replica: int) -> None:
        """Note that this replica is sent a prompt with these blocks."""
        for key in keys:
            self._replicas[key] = self._replicas.pop(key, 0) | 1 << replica
        while len(self._replicas) > self._max:
            self._replicas.popitem(last=False)

    def forget(self, replica: int) -> None:
        """It has been restarted: what it had is gone."""
        for key in self._replicas:
            self._replicas[key] &= ~(1 << replica)
