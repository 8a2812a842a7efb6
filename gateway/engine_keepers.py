"""Who keeps the engine processes up that a worker's worlds run on: the worker itself, or the parent of several.

Either starts another one while the first still serves, so that a policy may bring models which no engine has loaded.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gateway.engine_needs import EngineNeeds
from gateway.engine_process import EngineEnded, EngineProcess


class EngineKeeper(Protocol):
    """Engines by the place where they answer: a socket."""

    shared: bool
    """Other workers may have had it start the engine long ago."""

    async def place(self, needs: EngineNeeds) -> Path:
        """Where an engine with these needs answers, sooner or later; it is kept up until it is left."""
        ...

    async def up(self, place: Path) -> None:
        """Returns once the engine has come up. Raises EngineEnded where its first start failed."""
        ...

    async def leave(self, place: Path) -> None:
        """This worker has no use for it any more."""
        ...

    async def stop(self) -> None:
        """Leave them all."""
        ...


class OwnEngines:
    """Of a gateway of one worker: processes of its own."""

    shared = False

    def __init__(self, first: Path) -> None:
        """`first`: the socket of the first; those of later ones lie beside it."""
        self._first = first
        self._count = itertools.count(1)
        self.processes: dict[Path, EngineProcess] = {}

    async def place(self, needs: EngineNeeds) -> Path:
        place = nth_socket(self._first, next(self._count))
        process = self.processes[place] = EngineProcess(needs, place)
        process.start()
        return place

    async def up(self, place: Path) -> None:
        await self.processes[place].up()

    async def leave(self, place: Path) -> None:
        await self.processes.pop(place).stop()

    async def stop(self) -> None:
        for place in tuple(self.processes):
            await self.leave(place)


class EnginesOfParent:
    """Of one of several workers: asked for over its line to its parent (`gateway.shared_engines` answers)."""

    shared = True

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asked: asyncio.Queue[asyncio.Future[Path]] = asyncio.Queue()
        self._up: dict[Path, asyncio.Future[str | None]] = {}
        """By place: None once it is up, or why it is not."""
        self.orphaned = asyncio.create_task(self._hear(), name="parent")
        """Done when the parent is gone."""

    def serving(self) -> None:
        """Tell the parent that this worker serves."""
        say(self._writer, {"serving": True})

    async def place(self, needs: EngineNeeds) -> Path:
        answer: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(answer)
        say(self._writer, {"needs": needs})
        return await answer

    async def up(self, place: Path) -> None:
        if (why := await asyncio.shield(self._up[place])) is not None:
            raise EngineEnded(why)

    async def leave(self, place: Path) -> None:
        del self._up[place]
        say(self._writer, {"leave": str(place)})

    async def stop(self) -> None:
        for place in tuple(self._up):
            await self.leave(place)

    async def _hear(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                told = json.loads(line)
                place = Path(told["place"])
                if "up" in told:
                    if (waiting := self._up.get(place)) is not None and not waiting.done():
                        waiting.set_result(told["up"] or None)
                else:
                    self._up.setdefault(place, asyncio.get_running_loop().create_future())
                    answer = self._asked.get_nowait()
                    if not answer.done():
                        answer.set_result(place)
        while not self._asked.empty():
            self._asked.get_nowait().set_exception(EngineEnded("the parent of the workers is gone"))
        for waiting in self._up.values():
            if not waiting.done():
                waiting.set_result("the parent of the workers is gone")


def say(line: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    """One message on the line between a worker and its parent, unless that has gone."""
    if not line.is_closing():
        line.write(json.dumps(message).encode() + b"\n")


def nth_socket(first: Path, number: int) -> Path:
    """The place of the n-th engine of one gateway, counted from 1: none is used twice."""
    return first if number == 1 else first.with_name(f"{first.stem}-{number}{first.suffix}")
