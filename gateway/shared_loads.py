"""What all workers have under way at their targets, in Redis: each tells its own four times a second, and hears all.

No request waits for it. A worker that falls silent is forgotten within `SILENT_S`; where Redis is away, each goes by
what it sends itself.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import msgspec

from gateway.loads import Loads, Told
from gateway.redis_link import RedisAway, RedisLink

PERIOD_S = 0.25
PATIENCE_S = 1.0
"""For one exchange with Redis."""
SILENT_S = 2.0
"""A worker that has told nothing new for so long counts for nothing."""
_KEY = "leadline:loads"
_KEPT_S = 60


class _Line(msgspec.Struct, array_like=True):
    turn: int
    """Grows with each telling: no two hosts' clocks are compared."""
    models: dict[str, Told]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


class SharedLoads:
    """`loads`: those in force, which a new policy may replace; None: no route decides by time, and others may."""

    def __init__(self, link: RedisLink, loads: Callable[[], Loads | None]) -> None:
        self._link = link
        self._loads = loads
        self._worker = uuid4().hex
        self._turn = 0
        self._heard: dict[str, tuple[int, float]] = {}
        """Worker → (its last turn, when that was new)."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._go_on(), name="shared-loads")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(RedisAway):
            await self._link.call(lambda redis: redis.hdel(_KEY, self._worker))

    async def exchange(self) -> None:
        """Tell, and hear, once."""
        loads = self._loads()
        if loads is None:
            return
        self._turn += 1
        line = _encode(_Line(self._turn, loads.told()))

        async def ask(redis: Any) -> dict[bytes, bytes]:
            async with redis.pipeline(transaction=False) as pipeline:
                pipeline.hset(_KEY, self._worker, line).expire(_KEY, _KEPT_S).hgetall(_KEY)
                found: dict[bytes, bytes] = (await pipeline.execute())[-1]
                return found

        try:
            told = await self._link.call(ask)
        except RedisAway:
            loads.hear(())
            return
        loads.hear(self._still_there(told, time.monotonic()))
        if silent := [name for name, (_, since) in self._heard.items() if time.monotonic() - since > _KEPT_S]:
            for name in silent:
                del self._heard[name]
            with contextlib.suppress(RedisAway):
                await self._link.call(lambda redis: redis.hdel(_KEY, *silent))

    def _still_there(self, told: Mapping[bytes, bytes], now: float) -> list[Mapping[str, Told]]:
        found: list[Mapping[str, Told]] = []
        for key, text in told.items():
            name = key.decode()
            if name == self._worker:
                continue
            try:
                line = _decode(text)
            except msgspec.DecodeError:  # of another version
                continue
            turn, since = self._heard.get(name, (-1, now))
            if line.turn != turn:
                since = now
                self._heard[name] = line.turn, since
            if now - since <= SILENT_S:
                found.append(line.models)
        return found

    async def _go_on(self) -> None:
        while True:
            await self.exchange()
            await asyncio.sleep(PERIOD_S)
