"""The one way to Redis: asked within 50 ms, and left alone for a while when it does not answer.

Redis holds rates and cached answers, never money. Whatever is wrong with it (absent, dead, paused, loading, full, read
only, slow) is the same to whoever asks: `RedisAway`, after at most `TIMEOUT_S`, and from then on at once.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

TIMEOUT_S = 0.05
OPEN_S = 1.0
"""How long a Redis that failed is left alone before it is tried again, beside the requests."""
CONNECT_TIMEOUT_S = 1.0
"""Connecting takes some twenty turns of the event loop, which may be a busy one; no request waits for it."""
LEAST_S = 0.005
"""What a call is given that has waited long for its turn."""
FAILURES = (redis.RedisError, OSError, TimeoutError)

_T = TypeVar("_T")


class RedisAway(Exception):
    """Redis did not answer this call, or was not asked because it had not answered others."""


class RedisLink:
    """Owned by one event loop. `tell` hears whether it is up, whenever that changes."""

    def __init__(
        self, url: str, tell: Callable[[bool], None], *, timeout_s: float = TIMEOUT_S, open_s: float = OPEN_S
    ) -> None:
        # One try more on a connection that has died since: after a restart of Redis, all of them have.
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        self.client = redis.Redis.from_url(url, retry=again)
        self.up = True
        """Whether it answered when it was last asked."""
        self.timeout_s = timeout_s
        self._tell = tell
        self._open_s = open_s
        self._mending: asyncio.Task[None] | None = None

    async def check(self) -> bool:
        """Connect, so that its state is known from the start."""
        try:
            await self._prove()
        except FAILURES as error:
            self._failed(error)
        else:
            self._tell(True)
        return self.up

    async def call(self, ask: Callable[["redis.Redis"], Awaitable[_T]], *, waited_s: float = 0.0) -> _T:
        """The answer of `ask(client)`. Raises RedisAway within `timeout_s`, less what the caller has waited before."""
        if not self.up:
            raise RedisAway("Redis is left alone for a while")
        try:
            async with asyncio.timeout(max(LEAST_S, self.timeout_s - waited_s)):
                return await ask(self.client)
        except FAILURES as error:
            self._failed(error)
            raise RedisAway(type(error).__name__) from error

    async def close(self) -> None:
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        await self.client.aclose()

    def _failed(self, error: Exception) -> None:
        if self.up:
            log.warning("redis.away", error=f"{type(error).__name__}: {error}"[:200], retry_in_s=self._open_s)
            self.up = False
            self._tell(False)
            self._mending = asyncio.create_task(self._mend(), name="redis-mend")

    async def _mend(self) -> None:
        while not self.up:
            await asyncio.sleep(self._open_s)
            with suppress(*FAILURES):
                await self._prove()
                self.up = True
                self._tell(True)
                log.info("redis.back")

    async def _prove(self) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self.client.ping()
        async with asyncio.timeout(self.timeout_s):  # connected: as fast as requests need it?
            await self.client.ping()
