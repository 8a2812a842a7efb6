"""Durability `full`, end to end: nothing goes out and no answer ends before the disk has what says so.

The disk turns only when the test lets it, through the journal's own hook.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger.journal import Closed, Dispatched, Opened, _read, segments, to_disk
from tests.gateway.conftest import Gateway, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

PATIENCE_S = 0.15
"""What may happen without the disk has happened after this long."""


class Disk:
    """Each sync waits for its turn; `safe` is what power loss would leave of the journal."""

    def __init__(self, gateway: Gateway, folder: Path) -> None:
        self._folder = folder
        self._changes = threading.Lock()
        self._turns = threading.Semaphore(0)
        self._free = False
        self.waiting = 0
        """Syncs that no turn was given to yet."""
        self.safe: list[Opened | Dispatched | Closed] = []
        self.journal = gateway.app.state.lifecycle.ledger.journal
        self.journal._sync = self._sync

    def _sync(self, fd: int) -> None:
        written = [entry for path in segments(self._folder) for entry in _read(path)]
        with self._changes:
            waits = not self._free
            self.waiting += waits
        if waits:
            self._turns.acquire()
        to_disk(fd)
        self.safe = written

    def turn(self) -> None:
        """For one sync that waits; none is laid up for those to come."""
        with self._changes:
            if self.waiting:
                self.waiting -= 1
                self._turns.release()

    def free(self) -> None:
        with self._changes:
            self._free = True
            self._turns.release(self.waiting or 1)
            self.waiting = 0

    def sessions(self, kind: type[Opened | Dispatched | Closed]) -> set[str | None]:
        """Whose record of this kind is safe, by the caller's session."""
        session_of = {entry.request.id: entry.request.session for entry in self.safe if isinstance(entry, Opened)}
        if kind is Dispatched:
            return {session_of[entry.attempt.request_id] for entry in self.safe if isinstance(entry, Dispatched)}
        return {
            entry.request.session
            for entry in self.safe
            if isinstance(entry, Opened | Closed) and isinstance(entry, kind)
        }


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> AsyncIterator[Gateway]:
    async with start_gateway(durability="full") as running_gateway:
        yield running_gateway


@pytest.fixture
async def disk(gateway: Gateway, tmp_path: Path) -> AsyncIterator[Disk]:
    found = Disk(gateway, next((tmp_path / "home" / "journal").iterdir()))
    yield found
    found.free()


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_goes_out_and_no_answer_ends_before_the_disk_has_it(
    gateway: Gateway, upstream: FakeUpstream, disk: Disk, stream: bool
) -> None:
    body = ask(model="uncached")
    calling = asyncio.create_task(gateway.stream(body) if stream else gateway.chat(body))
    await until(lambda: disk.waiting)
    await asyncio.sleep(PATIENCE_S)
    assert upstream.bodies == [], "the attempt waits for the disk"
    while not upstream.bodies:  # a turn for each descriptor that the first sync has: the folder and the segment
        disk.turn()
        await asyncio.sleep(0.02)
    assert any(isinstance(entry, Dispatched) for entry in disk.safe)
    await until(lambda: disk.waiting)
    await asyncio.sleep(PATIENCE_S)
    assert not calling.done(), "the answer's end waits for the disk"
    assert not any(isinstance(entry, Closed) for entry in disk.safe)
    while not calling.done():
        disk.turn()
        await asyncio.sleep(0.02)
    assert any(isinstance(entry, Closed) for entry in disk.safe)
    assert (await calling)[0] == 200


async def test_errors_are_told_after_the_disk_has_them(gateway: Gateway, upstream: FakeUpstream, disk: Disk) -> None:
    disk.free()
    assert (await gateway.chat(ask(model="gone"), **{"X-Session-Id": "lost"}))[0] == 502
    assert disk.sessions(Dispatched) == disk.sessions(Closed) == {"lost"}


async def test_many_at_once_share_the_disks_turns_and_none_is_early(
    gateway: Gateway, upstream: FakeUpstream, disk: Disk
) -> None:
    early: list[str] = []

    async def look(upstream: FakeUpstream, request: Any, body: dict[str, Any]) -> Any:
        if body["messages"][0]["content"] not in disk.sessions(Dispatched):
            early.append(body["messages"][0]["content"])
        return await (upstream.stream(request, body) if body.get("stream") else upstream.plain(body))

    upstream.faults = [look] * 24

    async def one(number: int) -> None:
        name = f"call-{number}"
        send = gateway.stream if number % 2 else gateway.chat
        assert (await send(ask(name, model="uncached"), **{"X-Session-Id": name}))[0] == 200
        if name not in disk.sessions(Closed):
            early.append(name)

    async def turns() -> None:
        while True:
            disk.turn()
            await asyncio.sleep(0.01)

    turning = asyncio.create_task(turns())
    async with asyncio.TaskGroup() as group:
        for number in range(24):
            group.create_task(one(number))
    turning.cancel()
    assert early == []
    assert len(upstream.truth) == 24


async def test_a_caller_who_leaves_before_the_call_went_out_pays_nothing(
    gateway: Gateway, upstream: FakeUpstream, disk: Disk
) -> None:
    calling = asyncio.create_task(gateway.chat(ask()))
    await until(lambda: disk.waiting)
    calling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await calling
    disk.free()
    rows = await gateway.rows()
    while not rows:
        await asyncio.sleep(0.02)
        rows = await gateway.rows()
    (row,) = rows
    assert (row["outcome"], row["cost_nanousd"], row["attempt_rows"][0]["outcome"]) == ("cancelled", 0, "not_sent")
    assert upstream.bodies == []


async def test_a_disk_that_fails_lets_nothing_out(gateway: Gateway, upstream: FakeUpstream) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "the disk is gone")

    gateway.app.state.lifecycle.ledger.journal._sync = broken
    for _ in range(2):
        status, headers, body = await gateway.chat(ask())
        assert (status, body["error"]["code"], headers["x-should-retry"]) == (503, "unavailable", "true")
    assert upstream.bodies == []
