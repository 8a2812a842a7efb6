"""The policy file, watched: a new version of it is put in force whole, or refused whole.

A version is read once the file has stayed as it is for one look, so that nobody reads it half written; loaded, held
against this machine and built into a world beside the one in force; and then put in its place in one step. Requests
under way keep the world that they were admitted under. What is wrong with a version is said in the log, in the metrics,
at `/health/readiness` and on the dashboard, until a good one comes; the one in force stays in force.

Each worker watches by itself, so that all of them have a new version within about a second.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from gateway import tiers
from gateway.engine_link import EngineConnection
from gateway.engines import Engines
from gateway.policies import CannotServe, checked_policy
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.world import MissingSecret, World
from routers.policy import Policy

log = get_logger(__name__)

LOOK_S = 0.5
_Mark = tuple[int, int, int] | None
"""Of a file's content, as far as the folder tells: inode, size, time of the last change. None: no file."""


class PolicyReloader:
    """Owns the task that watches one policy file, from `start` to `stop`."""

    def __init__(
        self,
        file: Path,
        metrics: Metrics,
        *,
        current: Callable[[], World],
        build: Callable[[Policy, EngineConnection], World],
        swap: Callable[[World], None],
        engines: Engines,
    ) -> None:
        """`build` makes the world of a policy that runs on an engine, `swap` puts it in force."""
        self._file = file
        self._metrics = metrics
        self._current = current
        self._build = build
        self._swap = swap
        self._engines = engines
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.refused: str | None = None
        """Why the file as it is now is not in force; None: it is."""
        self.since_ms = time.time_ns() // 1_000_000
        """When the policy in force was put in force."""

    @property
    def waits(self) -> bool:
        """A new version waits for a fresh engine, which loads what it names."""
        return self._engines.starting

    def start(self) -> None:
        """From here on a change is noticed, however late the task comes to its first look."""
        self._task = asyncio.create_task(self._watch(_mark(self._file)), name="policy-watch")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def look(self) -> None:
        """Read the file now, whether or not it has changed."""
        self._wanted.set()

    async def _watch(self, tried: _Mark) -> None:
        before = tried
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            now = await asyncio.to_thread(_mark, self._file)
            if self._wanted.is_set() or (now == before and now != tried):
                self._wanted.clear()
                tried = now
                await self._load()
            before = now

    async def _load(self) -> None:
        try:
            policy, _ = await asyncio.to_thread(checked_policy, self._file)
            engine = await self._engines.fitting(policy, self._file)
            now = self._current()
            before = now.policy.version_hash
            marks = await asyncio.to_thread(tiers.marks, policy, self._file.parent.absolute())
            # A certificate that a guarantee is bound to, and what is in an artifact, are not in the version.
            if policy != now.policy or engine is not now.engine or marks != now.probes.marks:
                self._swap(await asyncio.to_thread(self._build, policy, engine))
                self.since_ms = time.time_ns() // 1_000_000
                log.info("policy.loaded", file=str(self._file), version=policy.version_hash, before=before)
                self._metrics.policy_loaded(refused=False)
            self.refused = None
        except (CannotServe, MissingSecret) as error:
            await self._engines.drop()
            self._refuse(str(error))
        except Exception as error:
            await self._engines.drop()
            log.exception("policy.load_failed")
            self._refuse(f"{self._file}: cannot be loaded ({type(error).__name__}); the log says more")

    def _refuse(self, why: str) -> None:
        self.refused = why
        log.error("policy.refused", file=str(self._file), kept=self._current().policy.version_hash, problems=why)
        self._metrics.policy_loaded(refused=True)


def _mark(file: Path) -> _Mark:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
