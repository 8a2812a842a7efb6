"""The one way to Redis: asked within 50 ms, and left alone for a while when it does not answer.

Redis holds rates and cached answers, never money. Whatever is wrong with it (absent, dead, paused, loading, full, read
only, slow) is the same to whoever asks: `RedisAway`, at once or after at most `TIMEOUT_S`, and then in its own way.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = structlog.get_logger(__name__)

TIMEOUT_S = 0.05
OPEN_S = 1.0
"""How long a Redis that failed is not asked; then one call tries it for all."""
LAG_S = 0.01
"""A timer this late says that our own event loop is behind, not Redis."""
GRACE_S = 0.005

_T = TypeVar("_T")


class RedisAway(Exception):
    """Redis did not answer this call, or was not asked because it had not answered others."""


class RedisLink:
    """Owned by one event loop. `up` hears of every change; `clock` is any monotonic clock in seconds."""

    def __init__(
        self,
        url: str,
        up: Callable[[bool], None],
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # One try more on a connection that has died since: after a restart of Redis, all of them have.
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        self.client = redis.Redis.from_url(url, retry=again)
        self.timeout_s = timeout_s
        self._up = up
        self._clock = clock
        self._open_until: float | None = None
        self._probing = False

    @property
    def up(self) -> bool:
        """Whether it answered when it was last asked."""
        return self._open_until is None

    @property
    def usable(self) -> bool:
        """Whether a call would go out now: it is up, or it is time to try it again."""
        return self._open_until is None or (not self._probing and self._clock() >= self._open_until)

    async def call(self, ask: Callable[["redis.Redis"], Awaitable[_T]], *, waited_s: float = 0.0) -> _T:
        """The answer of `ask(client)`. Raises RedisAway within `timeout_s`, less what the caller has waited before."""
        if not self.usable:
            raise RedisAway("Redis is left alone for a while")
        probe = self._probing = self._open_until is not None
        try:
            async with _patient(max(GRACE_S, self.timeout_s - waited_s)):
                answer = await ask(self.client)
        except (redis.RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            raise RedisAway(type(error).__name__) from error
        finally:
            if probe:
                self._probing = False
        if probe:
            self._open_until = None
            self._up(True)
            log.info("redis.back")
        return answer

    async def check(self) -> bool:
        """Ask once, so that its state is known."""
        try:
            await self.call(lambda client: client.ping())
        except RedisAway:
            return False
        self._up(True)
        return True

    async def close(self) -> None:
        await self.client.aclose()

    def _failed(self, error: Exception) -> None:
        if self._open_until is None:
            log.warning("redis.away", error=f"{type(error).__name__}: {error}"[:200], retry_in_s=OPEN_S)
        self._open_until = self._clock() + OPEN_S
        self._up(False)


@asynccontextmanager
async def _patient(timeout_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, that does not blame Redis when this event loop was too busy to read its answer."""
    loop = asyncio.get_running_loop()
    handle: asyncio.TimerHandle | None = None

    def expire(due: float, patience: int) -> None:
        nonlocal handle
        lag = loop.time() - due
        if patience and lag > LAG_S:
            again = loop.time() + lag
            handle = loop.call_at(again, expire, again, patience - 1)
        else:
            bound.reschedule(loop.time() + GRACE_S)

    async with asyncio.timeout(None) as bound:
        due = loop.time() + timeout_s
        handle = loop.call_at(due, expire, due, 3)
        try:
            yield
        finally:
            handle.cancel()
