"""The parent of several workers: `python -m gateway.workers PLAN`, PLAN being JSON from `gateway.serve`.

It owns the listening sockets, one per place (SO_REUSEPORT: the kernel spreads connections evenly), and never closes
them while it lives: whatever becomes of a worker, connections that wait are served by the one that takes its place.
It starts the engine, and another one when workers ask for it (`gateway.shared_engines`), starts a dead worker again
after a pause, and acts on signals:

    SIGTERM, SIGINT   drain all workers, then end with status 0
    SIGHUP            rolling restart, one place at a time: start the replacement, wait until it serves, drain the old

A replacement that does not come up ends the rolling restart and leaves the old worker where it was. Light on purpose:
this process loads no web framework, no database driver and no model.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from gateway.banner import announce, url_of
from gateway.engine_keepers import say
from gateway.engine_needs import EngineNeeds
from gateway.shared_engines import SharedEngines
from gateway.telemetry.logs import configure_logs, get_logger

log = get_logger(__name__)

START_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0
STEADY_S = 60.0
"""A worker that lived this long is started again after the first pause, not after a longer one."""
KILL_AFTER_S = 20.0
"""How long a worker may outlive its drain window: cancelled requests are booked then, and the ledger is flushed."""


class Plan(TypedDict):
    listeners: list[int]
    """A listening socket per worker, inherited."""
    policy: str | None
    drain_s: float
    home: str
    peers: str
    """The folder where workers answer each other's scrapes."""
    made_first_key: bool
    engine: EngineNeeds | None
    """What the first engine is told; None: none is needed now, or somebody else keeps it up."""
    engine_socket: str
    engine_state: str
    """The engine in words, for the operator."""


class Order(TypedDict):
    """What one worker is told: the argument of `python -m gateway.worker`, as JSON."""

    worker: int
    listener: int
    control: int
    """Its line to its parent, JSON a line: it says that it serves, and asks for engines (`EnginesOfParent`). The end of
    this stream is the end of its parent."""
    policy: str | None
    drain_s: float
    peers: str


@dataclass(eq=False)
class Worker:
    index: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: "asyncio.Future[bool]"
    """Whether it came up."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


@dataclass(eq=False)
class Place:
    listener: int
    worker: Worker | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Workers:
    """Owns every worker of this host from `run` to its return."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._places = [Place(listener) for listener in plan["listeners"]]
        self._alive: set[Worker] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._roll_wanted = asyncio.Event()
        self._stop_signal = signal.SIGTERM
        self._engines = SharedEngines(Path(plan["engine_socket"]))

    async def run(self) -> int:
        """Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._roll_wanted.set)
        if self._plan["engine"] is not None:
            self._engines.start(self._plan["engine"])
        try:
            return await self._run()
        finally:
            await self._stop_all()
            await self._engines.stop()

    async def _run(self) -> int:
        for place in self._places:
            place.worker = await self._start(place)
        if not await self._all_ready():
            return 0 if self._stopping.is_set() else 1
        self._announce()
        keeping = [asyncio.create_task(self._keep(place)) for place in self._places]
        keeping.append(asyncio.create_task(self._roll_when_told()))
        try:
            await self._stopping.wait()
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
        return 0

    def _told_to_stop(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            _signal_all(self._alive, number)
        log.info("drain.begins", signal=number.name, workers=len(self._alive))
        self._stop_signal = number
        self._stopping.set()

    # one worker -----------------------------------------------------------------------------------------------------

    async def _start(self, place: Place) -> Worker:
        """A new process for this place, under an index that no living worker has: its journal is its own."""
        taken = {worker.index for worker in self._alive}
        index = next(i for i in itertools.count() if i not in taken)
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        with theirs:
            order = Order(
                worker=index, listener=place.listener, control=theirs.fileno(), policy=self._plan["policy"],
                drain_s=self._plan["drain_s"], peers=self._plan["peers"],
            )  # fmt: skip
            # A session of its own: Ctrl-C reaches this process alone, which then stops its workers in order.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.worker", json.dumps(order), stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True, pass_fds=(place.listener, theirs.fileno()),
            )  # fmt: skip
        worker = Worker(index, process, reader, writer, asyncio.get_running_loop().create_future())
        self._alive.add(worker)
        watching = asyncio.create_task(self._watch(worker))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        return worker

    async def _watch(self, worker: Worker) -> None:
        hearing = asyncio.create_task(self._hear(worker))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wait((hearing, worker.ready), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            worker.signal(signal.SIGKILL)
        if not worker.ready.done():
            worker.ready.set_result(False)
        status = await worker.process.wait()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        worker.writer.close()
        self._engines.forget(worker)
        self._alive.discard(worker)
        worker.ended.set()
        log.info("worker.ended", worker=worker.index, pid=worker.process.pid, status=status)

    async def _hear(self, worker: Worker) -> None:
        """What a worker says, until it has ended."""

        def tell(place: Path, why: str) -> None:
            say(worker.writer, {"place": str(place), "up": why})

        with contextlib.suppress(ConnectionError):
            while line := await worker.reader.readline():
                said = json.loads(line)
                if "needs" in said:
                    say(worker.writer, {"place": str(self._engines.place_of(said["needs"]))})
                    self._engines.use(worker, said["needs"], tell)
                elif "leave" in said:
                    self._engines.leave(worker, Path(said["leave"]))
                elif not worker.ready.done():
                    worker.ready.set_result(True)

    async def _keep(self, place: Place) -> None:
        """Start the worker of one place again whenever it has ended and nobody has replaced it."""
        pause = FIRST_PAUSE_S
        while True:
            worker = place.worker
            assert worker is not None
            await worker.ended.wait()
            if place.worker is not worker:
                continue
            if time.monotonic() - worker.began > STEADY_S:
                pause = FIRST_PAUSE_S
            log.error("worker.died", worker=worker.index, status=worker.process.returncode, restart_in_s=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_S)
            async with place.changing:
                if place.worker is worker:
                    place.worker = await self._start(place)

    # all workers ----------------------------------------------------------------------------------------------------

    async def _all_ready(self) -> bool:
        ready = asyncio.gather(*(place.worker.ready for place in self._places if place.worker is not None))
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return ready.done() and all(ready.result())

    def _announce(self) -> None:
        home = Path(self._plan["home"])
        with socket.socket(fileno=os.dup(self._places[0].listener)) as listener:
            url = url_of(listener.getsockname())
        first_key = (home / "key").read_text() if self._plan["made_first_key"] else None
        state = self._plan["engine_state"]
        announce(home, url, first_key=first_key, engine=state, workers=len(self._places))

    async def _roll_when_told(self) -> None:
        while True:
            await self._roll_wanted.wait()
            self._roll_wanted.clear()
            log.info("restart.begins", workers=len(self._places))
            done = [await self._replace(place) for place in self._places]
            log.info("restart.ends", replaced=sum(done), kept=len(done) - sum(done))

    async def _replace(self, place: Place) -> bool:
        """False, and the old worker stays, when its replacement does not come up."""
        async with place.changing:
            old = place.worker
            assert old is not None
            new = await self._start(place)
            if not await asyncio.shield(new.ready):
                log.error("restart.failed", worker=new.index, kept=old.index)
                return False
            place.worker = new
        old.signal(signal.SIGTERM)
        await self._until_ended((old,))
        return True

    async def _stop_all(self) -> None:
        alive = tuple(self._alive)
        _signal_all(alive, self._stop_signal)
        await self._until_ended(alive)
        await asyncio.gather(*self._watching)

    async def _until_ended(self, workers: Iterable[Worker]) -> None:
        try:
            async with asyncio.timeout(self._plan["drain_s"] + KILL_AFTER_S):
                for worker in workers:
                    await worker.ended.wait()
        except TimeoutError:
            log.error("worker.killed", workers=[worker.index for worker in workers if not worker.ended.is_set()])
            _signal_all(workers, signal.SIGKILL)


def _signal_all(workers: Iterable[Worker], number: signal.Signals) -> None:
    for worker in workers:
        worker.signal(number)


async def _main(plan: Plan) -> int:
    return await Workers(plan).run()


if __name__ == "__main__":
    configure_logs()
    sys.exit(asyncio.run(_main(json.loads(sys.argv[1]))))
