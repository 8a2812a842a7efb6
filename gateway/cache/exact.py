"""The exact response cache: the same request of the same tenant gets the same complete answer, for its ttl.

The key is a BLAKE3 hash, keyed by a secret of the server's, of the tenant, the policy version, the route, what the
caller's hints allow and every byte of the body except `stream` and `stream_options` (a stored answer can be replayed
either way). Only complete answers are stored. A request that asks for chance (`temperature` above 0 in so many words)
is not cached at all: see `cacheable`.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from blake3 import blake3

from routers.types import Endpoint, Hints

NOT_IN_KEY = frozenset({"stream", "stream_options", "metadata", "user", "store"})
"""Fields that do not change the answer's content."""

_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class CachedAnswer(msgspec.Struct, frozen=True):
    """A complete chat completion as it was first given."""

    body: bytes
    model: str
    provider: str


def cacheable(fields: Mapping[str, msgspec.Raw]) -> bool:
    """False for requests that ask for chance: an explicit temperature above zero without a seed."""
    temperature = bytes(fields.get("temperature", b"0"))
    try:
        return temperature == b"null" or float(temperature) == 0 or bytes(fields.get("seed", b"null")) != b"null"
    except ValueError:
        return False


def cache_secret(pepper: bytes) -> bytes:
    """What keys the hash: 32 bytes, for this use alone."""
    return blake3(pepper, derive_key_context="leadline exact cache").digest()


def cache_key(
    secret: bytes,
    *,
    tenant: str,
    policy_version: str,
    route: str,
    fields: Mapping[str, msgspec.Raw],
    endpoint: Endpoint = "chat.completions",
    hints: Hints | None = None,
) -> bytes:
    """32 bytes that differ whenever anything that can change the answer differs: JSON can be read in one way only."""
    kept = {name: fields[name] for name in fields if name not in NOT_IN_KEY}
    return blake3(_encode_sorted((tenant, policy_version, route, endpoint, kept, hints)), key=secret).digest()


class ExactCache(Protocol):
    async def get(self, key: bytes) -> CachedAnswer | None: ...

    async def put(self, key: bytes, answer: CachedAnswer, ttl_s: float) -> None: ...

    async def close(self) -> None: ...


class MemoryCache:
    """Least recently used, bounded by bytes. `clock` is any monotonic clock in seconds."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, CachedAnswer]] = OrderedDict()
        self._bytes = 0

    async def get(self, key: bytes) -> CachedAnswer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        expires, answer = entry
        if expires <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return answer

    async def put(self, key: bytes, answer: CachedAnswer, ttl_s: float) -> None:
        if len(answer.body) > self._max_bytes // 8:
            return
        self._drop(key)
        self._entries[key] = (self._clock() + ttl_s, answer)
        self._bytes += _weight(answer)
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    async def close(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def statistics(self) -> dict[str, int]:
        return {"entries": len(self._entries), "bytes": self._bytes}

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _weight(entry[1])


def _weight(answer: CachedAnswer) -> int:
    return len(answer.body) + 256
