"""The engine process from outside: start it, keep it up, stop it. Who wants its answers: `gateway.engine_link`.

Light on purpose: with several workers, their parent runs this, and it loads neither a model nor a web framework.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from gateway.engine_needs import EngineNeeds
from gateway.telemetry.logs import get_logger
from local_engine.errors import ConfigError
from local_engine.place import clear

log = get_logger(__name__)

START_TIMEOUT_S = 120.0
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0
STOP_TIMEOUT_S = 5.0
LOOK_S = 0.02


class EngineEnded(RuntimeError):
    """The engine process ended, or did not start; the message says how."""


class EngineProcess:
    """Owns the process from `start` to `stop`; starts it again after a pause that doubles up to `MAX_PAUSE_S`."""

    def __init__(self, needs: EngineNeeds, socket: Path, *, alone: bool = False) -> None:
        """`socket`: where it answers. `alone`: another's engine may answer there, which is left alone; and where the
        first start fails, there is no other."""
        self._needs = needs
        self._socket = socket
        self._alone = alone
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()
        """Set once the engine has ended or could not start."""
        self._came_up = asyncio.Event()
        self._why = ""

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def up(self) -> None:
        """Returns once the engine has come up. Raises EngineEnded where its first start failed."""
        waits = [asyncio.create_task(event.wait()) for event in (self._came_up, self.failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._came_up.is_set():
            raise EngineEnded(self._why)

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
            except (EngineEnded, ConfigError, OSError, TimeoutError) as error:
                self._why = str(error)[:300] or f"it did not come up within {START_TIMEOUT_S:g} s"
                self.failed.set()
                log.error("engine.failed", error=self._why)
            await self._end()
            if self._alone and not self._came_up.is_set():
                return
            if time.monotonic() - began > 60:
                pause = FIRST_PAUSE_S
            log.warning("engine.restarting", pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_S)

    async def _run_once(self) -> None:
        """Start the engine; raises EngineEnded when it has ended, TimeoutError when it does not come up."""
        if self._alone:
            clear(str(self._socket))
        else:
            self._socket.unlink(missing_ok=True)
        # A session of its own: Ctrl-C reaches the gateway alone, which then stops its engine in order.
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.engine_main", json.dumps(self._needs), str(self._socket),
            stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        async with asyncio.timeout(START_TIMEOUT_S):
            while not self._socket.exists():  # it appears when the engine is ready to answer
                if process.returncode is not None:
                    raise EngineEnded(f"the engine process ended with status {process.returncode} while starting")
                await asyncio.sleep(LOOK_S)
        self._came_up.set()
        log.info("engine.started", pid=process.pid)
        raise EngineEnded(f"the engine process ended with status {await process.wait()}")

    async def _end(self) -> None:
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
