"""The exact response cache on Redis: one for all workers and hosts."""

import contextlib

import msgspec

from gateway.cache.exact import CachedAnswer
from gateway.redis_link import RedisAway, RedisLink

_REDIS_PREFIX = b"leadline:exact:"


class RedisCache:
    """Shared by all workers. Without Redis every look-up is a miss."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._decoder = msgspec.msgpack.Decoder(CachedAnswer)

    async def get(self, key: bytes) -> CachedAnswer | None:
        try:
            value = await self._link.call(lambda client: client.get(_REDIS_PREFIX + key))
            return self._decoder.decode(value) if isinstance(value, bytes) else None
        except (RedisAway, msgspec.DecodeError):
            return None

    async def put(self, key: bytes, answer: CachedAnswer, ttl_s: float) -> None:
        value, px = msgspec.msgpack.encode(answer), max(1, int(ttl_s * 1000))
        with contextlib.suppress(RedisAway):
            await self._link.call(lambda client: client.set(_REDIS_PREFIX + key, value, px=px))

    async def close(self) -> None:
        """The link belongs to whoever opened it."""
