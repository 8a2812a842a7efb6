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

from gateway.engine_needs import EngineNeeds
from gateway.policies import CannotServe, checked_policy, engine_needs, located
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.world import MissingSecret, World
from routers.policy import Policy

log = get_logger(__name__)

LOOK_S = 0.5
RESTART = "restart the gateway to load it: the engine loads at its start alone"
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
        build: Callable[[Policy], World],
        swap: Callable[[World], None],
        running: EngineNeeds | None,
        loaded: Callable[[], frozenset[str]],
    ) -> None:
        """`build` makes the world of a policy, `swap` puts it in force. `running`: what the engine was started with;
        `loaded`: the models that it says it has."""
        self._file = file
        self._metrics = metrics
        self._current = current
        self._build = build
        self._swap = swap
        self._running = running
        self._loaded = loaded
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.refused: str | None = None
        """Why the file as it is now is not in force; None: it is."""
        self.since_ms = time.time_ns() // 1_000_000
        """When the policy in force was put in force."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="policy-watch")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def look(self) -> None:
        """Read the file now, whether or not it has changed."""
        self._wanted.set()

    async def _watch(self) -> None:
        tried = before = await asyncio.to_thread(_mark, self._file)
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
            self._keep_to_engine(policy)
            before = self._current().policy.version_hash
            if policy != self._current().policy:  # a certificate that a guarantee is bound to is not in the version
                self._swap(await asyncio.to_thread(self._build, policy))
                self.since_ms = time.time_ns() // 1_000_000
                log.info("policy.loaded", file=str(self._file), version=policy.version_hash, before=before)
                self._metrics.policy_loaded(refused=False)
            self.refused = None
        except (CannotServe, MissingSecret) as error:
            self._refuse(str(error))
        except Exception as error:
            log.exception("policy.load_failed")
            self._refuse(f"{self._file}: cannot be loaded ({type(error).__name__}); the log says more")

    def _refuse(self, why: str) -> None:
        self.refused = why
        log.error("policy.refused", file=str(self._file), kept=self._current().policy.version_hash, problems=why)
        self._metrics.policy_loaded(refused=True)

    def _keep_to_engine(self, policy: Policy) -> None:
        """Raises CannotServe for what the engine would have to load: it does so only at its start."""
        needs = engine_needs(policy, self._file.parent.absolute(), Path())
        if needs is None:
            return
        running = self._running
        has = self._loaded()
        wrong = []
        fields = {model.upstream: f"models.{model.name}" for model in policy.models.values()}
        for name, source in needs["models"].items():
            field = fields[name]
            at_start = running["models"].get(name) if running is not None else None
            if at_start is None and name not in has:
                wrong.append(
                    f"{field}.model: the engine has not loaded {name!r} but {', '.join(sorted(has)) or 'nothing'}"
                )
            elif at_start is not None and at_start != source:
                wrong.append(f"{field}.model: the engine has loaded {name!r} from elsewhere")
            elif running is not None and needs["speculation"].get(name) != running["speculation"].get(name):
                wrong.append(f"{field}.speculation: the engine drafts for {name!r} as it was told at its start")
        if running is None and needs["probe"] is not None:
            wrong.append("signals.difficulty.probe: the engine has loaded no probe")
        elif running is not None and needs["probe"] not in (None, running["probe"]):
            wrong.append("signals.difficulty.probe: the engine has loaded another probe")
        at_start_hears = running["readers"] if running is not None else {}
        if any(at_start_hears.get(name) != found for name, found in needs["readers"].items()):
            wrong.append("signals.difficulty.probe: the engine has not loaded these probes of its models")
        if running is not None and needs["encoder"] != running["encoder"] and (needs["probe"] or needs["embeds"]):
            wrong.append("signals.difficulty.encoder: the engine has loaded another encoder")
        for name, probes in needs["readers"].items():
            if running is None or not set(probes) <= set(running["readers"].get(name, ())):
                wrong.append(f"signals.difficulty.probe: the engine has not loaded what hears {name!r} read")
        if needs["embeds"] and (running is None or not (running["embeds"] or running["probe"])):
            wrong.append("models: the engine has loaded no encoder to embed with")
        if wrong:
            raise CannotServe("\n".join(located([f"{one}; {RESTART}" for one in wrong], self._file)))


def _mark(file: Path) -> _Mark:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
