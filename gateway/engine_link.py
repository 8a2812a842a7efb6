"""A worker's link to an engine process that somebody keeps up: this gateway, its parent, or another container.

What was in flight when the link is lost ends with a typed error at once; new requests see `client is None` until the
engine answers again. An engine that hangs keeps its link: it is asked now and then, and while it says nothing new
requests see none, and so go elsewhere; what is in flight ends with a typed error where it goes on to say nothing.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Protocol

from gateway.telemetry.logs import get_logger
from local_engine.client import EngineClient
from local_engine.errors import EngineGone

log = get_logger(__name__)

GREETING_TIMEOUT_S = 10.0
RETRY_S = 0.05
ASKED_EVERY_S = 5.0
"""How often an engine is asked whether it still answers, which takes it a fraction of a millisecond."""
GIVEN_UP_AFTER_S = 30.0
"""How long an engine may say nothing before what is in flight ends."""


class _Counts(Protocol):
    def inc(self) -> None: ...


class _Shows(Protocol):
    def set(self, value: float, /) -> None: ...


class LinkMetrics(Protocol):
    """Who is told whether the engine answers, and that it was started again."""

    @property
    def engine_up(self) -> _Shows: ...

    @property
    def engine_restarts(self) -> _Counts: ...


class _Unheard:
    """Metrics that nobody reads."""

    def __init__(self) -> None:
        self.engine_up = self.engine_restarts = self

    def set(self, value: float, /) -> None: ...

    def inc(self) -> None: ...


class EngineConnection:
    """Owns the connection from `start` to `stop`, and makes it again whenever it is lost."""

    def __init__(self, socket_path: Path, metrics: LinkMetrics) -> None:
        self._socket_path = str(socket_path)
        self._metrics = metrics
        self._client: EngineClient | None = None
        self._silent = False
        self._task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        """Set while the engine answers."""

    @property
    def client(self) -> EngineClient | None:
        client = self._client
        return client if client is not None and client.connected and not self._silent else None

    @property
    def silent(self) -> bool:
        """Whether there is an engine that does not answer, as it was asked last."""
        return self._silent and self._client is not None and self._client.connected

    def loaded(self) -> frozenset[str]:
        """The models that the engine says it has; empty while none answers."""
        client = self.client
        return frozenset(card.name for card in client.hello.models) if client is not None else frozenset()

    @property
    def pid(self) -> int | None:
        """The engine's process, as it says; None while none is connected."""
        client = self._client
        return client.hello.pid if client is not None and client.connected else None

    @property
    def started(self) -> bool:
        """Whether this gateway wants an engine at all."""
        return self._task is not None

    @property
    def there(self) -> bool:
        """Whether something listened at its place, if only once."""
        return Path(self._socket_path).exists()

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name="engine-link")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def retire(self) -> None:
        """As `stop`; whether an engine is up is another link's to tell by now."""
        self._metrics = _Unheard()
        await self.stop()

    async def _keep(self) -> None:
        client = EngineClient(self._socket_path)
        earlier: int | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(GREETING_TIMEOUT_S):
                        hello = await client.connect()
                except (EngineGone, TimeoutError):  # not up, or not yet again
                    await asyncio.sleep(RETRY_S)
                    continue
                if earlier not in (None, hello.pid):
                    self._metrics.engine_restarts.inc()
                earlier = hello.pid
                self._client, self._silent = client, False
                self._tell(answers=True)
                log.info("engine.ready", pid=hello.pid, models=[card.name for card in hello.models])
                await self._until_closed(client)
                self._tell(answers=False)
                log.warning("engine.link_lost", pid=hello.pid)
        finally:
            self._client = None
            self._tell(answers=False)
            await client.close()

    async def _until_closed(self, client: EngineClient) -> None:
        """Told meanwhile whether it answers: until a process that hangs ends, its link stays."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASKED_EVERY_S):
                    await client.closed()
                    return
            try:
                await client.stats()
                silent = False
            except EngineGone:
                silent = client.connected
            if silent != self._silent:
                self._silent = silent
                self._tell(answers=not silent)
                log.warning("engine.silent" if silent else "engine.answers", pid=client.hello.pid)
            if not silent:
                heard = loop.time()
            elif client.busy and loop.time() - heard >= GIVEN_UP_AFTER_S:
                log.error("engine.given_up", pid=client.hello.pid, silent_s=round(loop.time() - heard, 1))
                client.give_up(f"it said nothing for {loop.time() - heard:.0f} s")

    def _tell(self, *, answers: bool) -> None:
        self._metrics.engine_up.set(int(answers))
        if answers:
            self.ready.set()
        else:
            self.ready.clear()
