"""The engines of several workers, kept up by their parent: one for each set of needs that some worker asks for.

Light: the parent loads no model. What it says to whom: `gateway.workers`.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.engine_keepers import nth_socket
from gateway.engine_needs import EngineNeeds
from gateway.engine_process import EngineEnded, EngineProcess

Tell = Callable[[Path, str], None]
"""Told, of an engine by its place, that it is up (""), or why its first start failed."""


@dataclass(eq=False)
class _Shared:
    place: Path
    process: EngineProcess
    users: dict[object, Tell] = field(default_factory=dict)
    """Workers."""
    told: str | None = None
    """What its users were told; None: nothing yet."""
    starting: "asyncio.Task[None] | None" = None


class SharedEngines:
    """Owns the processes until `stop`. One that no worker uses is stopped, but for the one that was asked for last and
    came up: workers that have died come back to it."""

    def __init__(self, first: Path) -> None:
        """`first`: the socket of the first; those of later ones lie beside it."""
        self._first = first
        self._count = 0
        self._engines: dict[str, _Shared] = {}
        """By needs, as JSON."""
        self._last: _Shared | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def start(self, needs: EngineNeeds) -> None:
        """Before any worker asks."""
        self._last = self._of(needs)

    def place_of(self, needs: EngineNeeds) -> Path:
        """Where an engine with these needs answers, sooner or later."""
        return self._of(needs).place

    def use(self, worker: object, needs: EngineNeeds, tell: Tell) -> None:
        """It is kept up for `worker` until that leaves it. `tell` is called once it is known whether it came up."""
        engine = self._of(needs)
        engine.users[worker] = tell
        if engine.told is not None:
            tell(engine.place, engine.told)
        if engine.told == "":
            self._last = engine

    def leave(self, worker: object, place: Path) -> None:
        for engine in [one for one in self._engines.values() if one.place == place]:
            engine.users.pop(worker, None)
        self._end_unused()

    def forget(self, worker: object) -> None:
        """The worker has ended."""
        for engine in self._engines.values():
            engine.users.pop(worker, None)
        self._end_unused()

    async def stop(self) -> None:
        for engine in self._engines.values():
            self._end(engine)
        self._engines.clear()
        await asyncio.gather(*self._ending)

    def _of(self, needs: EngineNeeds) -> _Shared:
        key = json.dumps(needs, sort_keys=True)
        if key not in self._engines:
            self._count += 1
            place = nth_socket(self._first, self._count)
            process = EngineProcess(needs, place)
            process.start()
            engine = self._engines[key] = _Shared(place, process)
            engine.starting = asyncio.create_task(self._tell_users(engine), name=f"engine at {place.name}")
        return self._engines[key]

    async def _tell_users(self, engine: _Shared) -> None:
        try:
            await engine.process.up()
            engine.told = ""
            if engine.users:
                self._last = engine
        except EngineEnded as error:
            engine.told = str(error)
        for tell in engine.users.values():
            tell(engine.place, engine.told)
        self._end_unused()

    def _end_unused(self) -> None:
        for key, engine in tuple(self._engines.items()):
            if not engine.users and engine is not self._last and engine.told is not None:
                del self._engines[key]
                self._end(engine)

    def _end(self, engine: _Shared) -> None:
        async def end() -> None:
            if engine.starting is not None:
                engine.starting.cancel()
            await engine.process.stop()

        task = asyncio.create_task(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
