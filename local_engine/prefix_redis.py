"""The Redis tier: blocks that engines on several hosts share, as long as Redis keeps them.

Keys are `leadline:kv:1:` + the tenant's root + the block's name, so tenants, models and layouts never meet; each has a
time to live, which use renews. Whoever can read this Redis can as good as read the prompts, and whoever can write it
decides what is computed from: it belongs behind a password and TLS like the database.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from local_engine.prefix_block import Block
from local_engine.prefix_format import encode
from local_engine.prefix_identity import ADDRESS_BYTES

PREFIX: Final = b"leadline:kv:1:"
TIMEOUT_S: Final = 1.0
_BATCH: Final = 16
"""Blocks asked for at once."""
_KNOWN: Final = 65_536
"""Blocks of which it is remembered that Redis has them."""


class RedisTier:
    """Owned by the worker thread of `SlowTiers`. Raises OSError when Redis does not answer within TIMEOUT_S."""

    medium = "redis"

    def __init__(self, url: str, *, ttl_s: int, value_bytes_limit: int) -> None:
        """Connects when first used. Raises ModuleNotFoundError without the redis package, ValueError for a bad URL."""
        try:
            import redis
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "KV in Redis needs the redis package: pip install 'leadline[server]'", name="redis"
            ) from error
        self._error = redis.RedisError
        self._client = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._ttl_s = ttl_s
        self._value_bytes_limit = value_bytes_limit
        self._known: OrderedDict[bytes, float] = OrderedDict()
        """Key → when it has to be renewed."""

    def may_have(self, root: bytes, digest: bytes) -> bool:
        """Only Redis knows."""
        return True

    def read(self, root: bytes, digests: Sequence[bytes]) -> list[bytes]:
        """The leading blocks that are there, as bytes."""
        found: list[bytes] = []
        for start in range(0, len(digests), _BATCH):
            batch = [_key(root, digest) for digest in digests[start : start + _BATCH]]
            with self._connected():
                values = self._client.mget(batch)
            for at, value in enumerate(values):
                if not isinstance(value, bytes):
                    for key in batch[at:]:
                        self._known.pop(key, None)
                    return found
                found.append(value)
        return found

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        """Write or renew the blocks of `path`; yields after each written one.

        The first block is always asked for, and where one is lost, the next one too, known or not: Redis may have lost
        everything since.
        """
        there = False
        with self._connected():
            for block in path:
                key = _key(root, block.digest)
                again = block in rewrite
                if there and not again and time.monotonic() < self._known.get(key, 0.0):
                    continue
                if again or not self._client.expire(key, self._ttl_s):
                    raw = encode(block)
                    if len(raw) > self._value_bytes_limit:
                        return
                    self._client.set(key, raw, ex=self._ttl_s)
                    self._remember(key)
                    there = False
                    yield
                else:
                    self._remember(key)
                    there = True

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        """Remove these blocks; None: all below the root."""
        with self._connected():
            if digests is None:
                keys = list(self._client.scan_iter(match=_key(root, b"") + b"*", count=1000))
            else:
                keys = [_key(root, digest) for digest in digests]
            for key in keys:
                self._known.pop(key, None)
            if keys:
                self._client.unlink(*keys)

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """A Redis that fails may have lost what it had when it is back."""
        try:
            yield
        except self._error as error:
            self._known.clear()
            raise OSError(str(error)) from error

    def _remember(self, key: bytes) -> None:
        self._known[key] = time.monotonic() + self._ttl_s / 2
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)


def _key(root: bytes, digest: bytes) -> bytes:
    return PREFIX + f"{root[:ADDRESS_BYTES].hex()}:{digest[:ADDRESS_BYTES].hex()}".encode()
