"""The exact response cache on Redis: one for all workers and hosts.

What the requests of one turn of the event loop ask goes out in one round trip, one at a time: the busier the worker,
the more of them share it.
"""

import asyncio
import time
from collections import deque
from typing import Any

import msgspec

from gateway.cache.exact import CachedAnswer
from gateway.redis_link import RedisAway, RedisLink

MAX_BATCH = 64
"""Commands of one round trip."""
MAX_BATCH_BYTES = 256 * 1024
"""Past this it goes out with what it has: a long answer to keep must not use up the time of all others."""
_REDIS_PREFIX = b"leadline:exact:"


class _Asked:
    __slots__ = ("answer", "asked_at", "command", "size")

    def __init__(self, command: tuple[Any, ...], size: int, answer: "asyncio.Future[Any]") -> None:
        self.command = command
        self.size = size
        self.answer = answer
        """None where Redis did not answer."""
        self.asked_at = time.monotonic()


class RedisCache:
    """Shared by all workers. Without Redis every look-up is a miss."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._decoder = msgspec.msgpack.Decoder(CachedAnswer)
        self._queue: deque[_Asked] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def get(self, key: bytes) -> CachedAnswer | None:
        value = await self._ask(("GET", _REDIS_PREFIX + key), 0)
        try:
            return self._decoder.decode(value) if isinstance(value, bytes) else None
        except msgspec.DecodeError:
            return None

    async def put(self, key: bytes, answer: CachedAnswer, ttl_s: float) -> None:
        value, px = msgspec.msgpack.encode(answer), max(1, int(ttl_s * 1000))
        await self._ask(("SET", _REDIS_PREFIX + key, value, "PX", px), len(value))

    async def close(self) -> None:
        """The link belongs to whoever opened it."""

    async def _ask(self, command: tuple[Any, ...], size: int) -> Any:
        """None where Redis is away."""
        if not self._link.up:
            return None
        asked = _Asked(command, size, asyncio.get_running_loop().create_future())
        self._queue.append(asked)
        if self._sending is None:
            # The task runs in the loop's next turn: by then all requests of this one have asked.
            self._sending = asyncio.create_task(self._send(), name="cache")
        return await asked.answer

    async def _send(self) -> None:
        try:
            while self._queue:
                batch = self._next_batch()
                answers: list[Any] = [None] * len(batch)
                try:
                    answers = await self._call(batch) if batch else []
                except RedisAway:
                    pass
                finally:
                    for asked, answer in zip(batch, answers, strict=True):
                        if not asked.answer.done():
                            asked.answer.set_result(answer)
        finally:
            self._sending = None

    def _next_batch(self) -> list[_Asked]:
        batch: list[_Asked] = []
        size = 0
        while self._queue and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            asked = self._queue.popleft()
            if not asked.answer.done():  # whoever asked has not left
                batch.append(asked)
                size += asked.size
        return batch

    async def _call(self, batch: list[_Asked]) -> list[Any]:
        waited_s = time.monotonic() - batch[0].asked_at
        if len(batch) == 1:  # a pipeline would cost half as much again
            client: Any = self._link.client  # redis-py gives this method no types
            return [await self._link.call(lambda _: client.execute_command(*batch[0].command), waited_s=waited_s)]
        pipeline = self._link.client.pipeline(transaction=False)
        for asked in batch:
            pipeline.execute_command(*asked.command)
        return await self._link.call(lambda _: pipeline.execute(), waited_s=waited_s)
