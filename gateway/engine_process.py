"""The engine process from the gateway's side: start it, keep it up, hand out its client.

One supervisor task starts `python -m gateway.engine_main`, connects, waits for the process or the link to end, and
starts again after a pause that doubles up to `MAX_PAUSE_S`. What was in flight ends with a typed error at once; new
requests see `client is None` until the engine is back.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from gateway.telemetry.metrics import Metrics
from local_engine.client import EngineClient
from local_engine.errors import EngineGone

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 120.0
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0
STOP_TIMEOUT_S = 5.0


class EngineProcess:
    """Owns the process from `start` to `stop`. `models` maps names to paths or hub ids."""

    def __init__(
        self, models: Mapping[str, str], probe: Path | None, encoder: str, socket_path: Path, metrics: Metrics
    ) -> None:
        self._models = dict(models)
        self._probe = probe
        self._encoder = encoder
        self._socket_path = socket_path
        self._metrics = metrics
        self._client: EngineClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        """Set while the engine answers."""
        self.failed = asyncio.Event()
        """Set once the engine has ended or could not start; it is being started again."""

    @property
    def client(self) -> EngineClient | None:
        client = self._client
        return client if client is not None and client.connected else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def started(self) -> bool:
        """Whether this gateway runs an engine at all."""
        return self._task is not None

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._end()

    async def _supervise(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await self._run_once()
            except (EngineGone, OSError, TimeoutError) as error:
                self.failed.set()
                log.error("engine.failed", error=str(error)[:300])
            finally:
                self.ready.clear()
                self._metrics.engine_up.set(0)
            await self._end()
            if time.monotonic() - began > 60:
                pause = FIRST_PAUSE_S
            log.warning("engine.restarting", pause_s=pause)
            self._metrics.engine_restarts.inc()
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_S)

    async def _run_once(self) -> None:
        """Start the engine and return when it has ended."""
        self._socket_path.unlink(missing_ok=True)
        config = {
            "models": self._models,
            "socket_path": str(self._socket_path),
            "probe": str(self._probe) if self._probe else None,
            "encoder": self._encoder,
        }
        # A session of its own: Ctrl-C reaches the gateway alone, which then stops its engine in order.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.engine_main", json.dumps(config),
            stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        client = EngineClient(str(self._socket_path))
        async with asyncio.timeout(START_TIMEOUT_S):
            while not client.connected:
                if self._process.returncode is not None:
                    raise EngineGone(f"the engine process ended with status {self._process.returncode} while starting")
                await asyncio.sleep(0.02)
                with contextlib.suppress(EngineGone):  # not listening yet
                    await client.connect()
        self._client = client
        self._metrics.engine_up.set(1)
        self.ready.set()
        log.info("engine.ready", pid=self._process.pid, models=[card.name for card in client.hello.models])
        ended, lost = asyncio.create_task(self._process.wait()), asyncio.create_task(client.closed())
        try:
            await asyncio.wait((ended, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            lost.cancel()
        if ended.done() and not ended.cancelled():
            raise EngineGone(f"the engine process ended with status {ended.result()}")
        raise EngineGone("the link to the engine process was lost")

    async def _end(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        process = self._process  # forgotten only once it has ended: a cancelled `_end` is done again by `stop`
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        self._process = None
