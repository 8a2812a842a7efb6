"""The engine that a worker's worlds run on, and the way to another one when a policy brings what it has not loaded.

A fresh engine is started beside it with all that the new policy names; once it answers, the new world runs on it. The
one before serves the requests that were admitted under it to their ends, and is left then. So nothing is loaded into a
process that somebody waits for, and one that cannot load leaves everything as it was. At any time there are at most
two: a third waits until the first has ended.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway import tiers
from gateway.engine_keepers import EngineKeeper
from gateway.engine_link import EngineConnection, LinkMetrics
from gateway.engine_needs import EngineNeeds
from gateway.engine_process import EngineEnded
from gateway.policies import CannotServe, engine_needs, located
from gateway.telemetry.logs import get_logger
from gateway.world import World
from routers.policy import Policy

log = get_logger(__name__)

QUIET_S = 2.0
"""How long nobody may have used an engine before it is left: a request is admitted within less."""
LOOK_S = 0.1
GREETING_S = 10.0


@dataclass(eq=False)
class Engine:
    """One engine, as this worker knows it."""

    link: EngineConnection
    needs: EngineNeeds | None
    """What it was told to load; None: there is none."""
    marks: Mapping[str, str]
    """Of the probes' artifacts, when it was."""
    place: Path | None = None
    """Where its keeper has it; None: somebody else keeps it up."""
    worlds: list[World] = field(default_factory=list)
    """That run on it."""


class Engines:
    """Owns the links of one worker, from `begin` to `stop`."""

    def __init__(self, keeper: EngineKeeper | None, outside: Path | None, folder: Path, metrics: LinkMetrics) -> None:
        """`outside`: the socket of an engine that somebody else keeps up, in place of a `keeper`. `folder`: the
        policy's."""
        self._keeper = keeper
        self._outside = outside
        self._folder = folder
        self._metrics = metrics
        self._now = Engine(EngineConnection(outside or Path(), metrics), None, {})
        self._fresh: Engine | None = None
        self._leaving: asyncio.Task[None] | None = None

    @property
    def link(self) -> EngineConnection:
        """To the engine in force."""
        return self._now.link

    @property
    def starting(self) -> bool:
        """A fresh engine is on its way."""
        return self._fresh is not None

    async def begin(self, policy: Policy) -> None:
        """Have the engine started that this policy needs, if it needs one; it comes up beside whoever called."""
        needs = engine_needs(policy, self._folder)
        if needs is None:
            return
        place = await self._keeper.place(needs) if self._keeper is not None else None
        at = place or self._outside
        assert at is not None
        self._now = Engine(EngineConnection(at, self._metrics), needs, tiers.marks(policy, self._folder), place)
        self.link.start()

    async def fitting(self, policy: Policy, file: Path) -> EngineConnection:
        """The link to an engine that has all that this policy names: the one in force, or a fresh one, which answers.

        A fresh one is to be put in force, or dropped. Raises CannotServe; then nothing has changed.
        """
        needs = await asyncio.to_thread(engine_needs, policy, self._folder)
        marks = await asyncio.to_thread(tiers.marks, policy, self._folder)
        wrong = _lacks(self._now, policy, needs, marks) if needs is not None else []
        if needs is None or not wrong:
            return self.link
        if self._keeper is None:
            fix = "restart that engine with this policy, then this gateway"
            raise _refused(wrong, f"somebody else keeps the engine up: {fix}", file)
        if self._leaving is not None and not self._leaving.done():
            log.info("engine.waiting", why="the one before the one in force is still being left")
            await asyncio.wait((self._leaving,))
        log.info("engine.another", wanted=wrong)
        place = await self._keeper.place(needs)
        fresh = self._fresh = Engine(EngineConnection(place, self._metrics), needs, marks, place)
        fresh.link.start()
        try:
            await self._keeper.up(place)
            async with asyncio.timeout(GREETING_S):
                await fresh.link.ready.wait()
        except (EngineEnded, TimeoutError) as error:
            await self.drop()
            told = f"a fresh engine for it did not start ({error or 'no answer'}); the log has its own words"
            raise _refused(wrong, told, file) from error
        except BaseException:
            await self.drop()
            raise
        return fresh.link

    async def drop(self) -> None:
        """Leave the fresh engine, if there is one: it was not put in force."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            await self._leave(fresh)

    def put_in_force(self, world: World) -> None:
        """`world` is in force from here on; with it the fresh engine, if it runs on that."""
        fresh = self._fresh
        if fresh is not None and world.engine is fresh.link:
            before, self._now, self._fresh = self._now, fresh, None
            self._leaving = asyncio.create_task(self._leave_when_quiet(before), name="engine-leaving")
        self._now.worlds = [one for one in self._now.worlds if one.under_way] + [world]

    async def stop(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._leaving
        await self.drop()
        await self.link.stop()
        if self._keeper is not None:
            await self._keeper.stop()

    async def _leave_when_quiet(self, engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        used = loop.time()
        try:
            while loop.time() - used < QUIET_S:
                client = engine.link.client
                if any(world.under_way for world in engine.worlds) or (client is not None and client.busy):
                    used = loop.time()
                await asyncio.sleep(LOOK_S)
        finally:  # at once where the gateway stops
            log.info("engine.left", pid=engine.link.pid)
            await self._leave(engine)

    async def _leave(self, engine: Engine) -> None:
        await engine.link.retire()
        if engine.place is not None and self._keeper is not None:
            await self._keeper.leave(engine.place)


def _refused(wrong: list[str], why: str, file: Path) -> CannotServe:
    return CannotServe("\n".join(located([f"{one}; {why}" for one in wrong], file)))


def _lacks(engine: Engine, policy: Policy, needs: EngineNeeds, marks: Mapping[str, str]) -> list[str]:
    """A sentence for all that the policy names and this engine has not loaded."""
    running, has = engine.needs, engine.link.loaded()
    wrong = []
    fields = {model.upstream: f"models.{model.name}" for model in policy.models.values()}
    for name, source in needs["models"].items():
        field = fields[name]
        told = running["models"].get(name) if running is not None else None
        if told is None and (engine.place is not None or name not in has):
            wrong.append(f"{field}.model: the engine has not loaded {name!r} but {', '.join(sorted(has)) or 'nothing'}")
        elif told is not None and told != source:
            wrong.append(f"{field}.model: the engine has loaded {name!r} from elsewhere")
        elif running is not None and needs["speculation"].get(name) != running["speculation"].get(name):
            wrong.append(f"{field}.speculation: the engine drafts for {name!r} as it was told at its start")
    if running is None and needs["probe"] is not None:
        wrong.append("signals.difficulty.probe: the engine has loaded no probe")
    elif running is not None and needs["probe"] not in (None, running["probe"]):
        wrong.append("signals.difficulty.probe: the engine has loaded another probe")
    for name, found in needs["readers"].items():
        if running is None or running["readers"].get(name) != found:
            wrong.append(f"signals.difficulty.probe: the engine has not loaded what hears {name!r} read")
    loaded = [needs["probe"], *(place for found in needs["readers"].values() for place in found)]
    if any(place in engine.marks and engine.marks[place] != marks.get(place) for place in loaded if place is not None):
        wrong.append("signals.difficulty.probe: the engine has loaded an earlier version of this probe")
    if running is not None and needs["encoder"] != running["encoder"] and (needs["probe"] or needs["embeds"]):
        wrong.append("signals.difficulty.encoder: the engine has loaded another encoder")
    if needs["embeds"] and (running is None or not (running["embeds"] or running["probe"])):
        wrong.append("models: the engine has loaded no encoder to embed with")
    return wrong
