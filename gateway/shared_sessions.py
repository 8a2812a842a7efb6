"""Conversations that all workers remember together, in Redis."""

from typing import Any

import msgspec

from gateway.redis_link import RedisAway, RedisLink
from gateway.sessions import KEPT_MS, REMEMBERED, Conversation, MemorySessions

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Conversation).decode


class SharedSessions:
    """Where Redis is away, each worker goes by what it has seen itself."""

    def __init__(self, link: RedisLink, limit: int = REMEMBERED) -> None:
        self._link = link
        self._own = MemorySessions(limit)

    async def get(self, key: bytes) -> Conversation | None:
        try:
            found: Any = await self._link.call(lambda redis: redis.get(_name(key)))
        except RedisAway:
            return await self._own.get(key)
        try:
            return _decode(found) if found is not None else None
        except msgspec.DecodeError:  # of another version
            return None

    async def put(self, key: bytes, conversation: Conversation) -> None:
        await self._own.put(key, conversation)
        try:
            await self._link.call(lambda redis: redis.set(_name(key), _encode(conversation), px=KEPT_MS))
        except RedisAway:
            return


def _name(key: bytes) -> bytes:
    return b"leadline:conversation:" + key.hex().encode()
