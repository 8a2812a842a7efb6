"""What a database that goes away at the wrong moment, and two budgets or workers at once, do to shared budgets."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from gateway.admission import budget_writer, shared_budgets
from gateway.admission.budget_writer import BudgetWriter
from gateway.admission.budgets import Budget
from gateway.admission.limits import BudgetLimit
from gateway.admission.slices import Slice
from gateway.errors import BudgetExceeded, Unavailable
from gateway.ledger.budget_rows import HoldRow
from tests.admission.test_budget_slices import CALL, MUCH, beaten, kept, patient, row_of, slice_of, until
from tests.admission.test_budgets import NOON
from tests.admission.test_budgets_shared import Worker, _blocked, _break_one_commit, call_of, engine, held, running, url

__all__ = ["engine", "patient", "url"]
anyio = pytest.mark.anyio


def _meanwhile(writer: BudgetWriter, work: Callable[[], object]) -> None:
    """`work` happens in another thread after the next failure's transaction has ended, before the thread goes on."""
    engine: Any = writer.engine
    dispose = engine.dispose

    def dispose_later(*arguments: Any) -> None:
        del engine.dispose
        dispose(*arguments)
        other = threading.Thread(target=work)
        other.start()
        other.join()

    engine.dispose = dispose_later


@anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("lost_before", [False, True])
async def test_what_came_of_a_lost_commit_is_found_out_once(
    url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_before: bool
) -> None:
    async with running(url, tmp_path) as worker:
        await beaten(worker)
        writer = worker.budgets._writer
        limit = BudgetLimit("key:k", "total", 100, "key:k")
        booked, given = [await worker.budgets.find([limit], NOON, name) for name in ("booked", "given")]
        (await booked.reserve(10)).settle(10)
        hold = await given.reserve(40)
        await worker.settled()
        writer._next_beat_s = 1e18
        _break_one_commit(worker.budgets._engine, before=lost_before)
        _meanwhile(writer, lambda: worker.insert(call_of("booked", booked), 10))
        together: list[Any] = []
        with monkeypatch.context() as gathering:
            gathering.setattr(writer, "put", together.append)
            hold.settle(0)
            asking = asyncio.create_task(given.reserve(30))
            looking = asyncio.create_task(worker.budgets.find([limit], NOON, "looking"))
            await until(lambda: len(together) == 3)
        writer.queue.extend(together)
        writer._wake.set()
        for asked in (asking, looking):
            with pytest.raises(Unavailable):
                await asked
        await until(lambda: slice_of(worker).asked == 0)
        await worker.settled()
        await worker.settled()
        assert held(engine) == (10, 0)
        assert (slice_of(worker).free, slice_of(worker).in_use) == (0, 0)


@anyio
async def test_a_lost_commit_is_looked_up_though_nobody_asks_again(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        await beaten(worker)
        account = await worker.budgets.find([BudgetLimit("key:k", "total", 100, "key:k")], NOON, "r")
        worker.budgets._writer._next_beat_s = 1e18
        _break_one_commit(worker.budgets._engine, before=False)
        with pytest.raises(Unavailable):
            await account.reserve(50)
        worker.budgets._writer._next_beat_s = 0.0
        await until(lambda: held(engine) == (0, 0))


@anyio
@pytest.mark.usefixtures("hasty")
async def test_a_slice_comes_back_though_its_worker_ended_without_the_database(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    worker = Worker(url, tmp_path, "w")
    await worker.start()
    await kept(worker)
    with _blocked(url):
        await worker.stop()
    assert row_of(engine).reserved_nanousd > 0
    async with running(url, tmp_path, "w"):
        assert row_of(engine).reserved_nanousd == 0


@anyio
@pytest.mark.usefixtures("patient")
async def test_what_is_unused_of_each_short_budget_is_recalled(
    url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_budgets, "IDLE_S", 1e9)
    limits = [MUCH, BudgetLimit("tenant:t", "total", 1_000_000, "tenant:t")]
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as other:
        await beaten(one)
        (await (await one.budgets.find(limits, NOON, "first")).reserve(CALL)).settle(0)
        assert all(slice.keeps for slice in one.budgets._slices.values())
        await beaten(other)
        await (await other.budgets.find(limits, NOON, "r")).reserve(1_000_000)


@anyio
@pytest.mark.usefixtures("patient")
async def test_nobody_begins_to_keep_what_another_one_waits_for(
    url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_budgets, "IDLE_S", 1e9)
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as two, running(url, tmp_path) as third:
        for worker in (one, two, third):
            await beaten(worker)
        await kept(one)
        with one.budgets._writer.lock:  # it does not hear of the recall yet
            asking = asyncio.create_task((await two.budgets.find([MUCH], NOON, "r")).reserve(1_000_000))
            await until(lambda: bool(row_of(engine).recalls))
            (await (await third.budgets.find([MUCH], NOON, "s")).reserve(CALL)).settle(0)
        await asking


@anyio
async def test_a_worker_is_waited_for_again_once_it_has_given_back(
    url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_budgets, "IDLE_S", 1e9)
    monkeypatch.setattr(budget_writer, "RECALL_S", 0.2)
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as other:
        await kept(one)
        await beaten(other)
        asking = await other.budgets.find([MUCH], NOON, "r")
        with one.budgets._writer.lock, pytest.raises(BudgetExceeded):
            await asking.reserve(1_000_000)
        await until(lambda: row_of(engine).spare_nanousd == 0)
        monkeypatch.setattr(budget_writer, "RECALL_S", 20.0)
        (await asking.reserve(1_000_000)).settle(0)
        await other.settled()
        slice_of(one).exact_until_s = 0.0
        (await (await one.budgets.find([MUCH], NOON, "s")).reserve(CALL)).settle(0)
        await until(lambda: slice_of(one).keeps)
        await asking.reserve(1_000_000)


def test_slices_begin_and_end_while_recalls_are_listened_for(url: str, engine: Engine) -> None:
    writer = BudgetWriter(engine, dead_after_s=30.0, tell=lambda *_: None, tell_beat=lambda _: None)
    slices = [Slice((f"key:{i}", "total"), Budget(f"key:{i}", 0, "total", 0, 0)) for i in range(2_000)]
    told = [{one.key: HoldRow("w", *one.key, spare_nanousd=spare) for one in slices} for spare in (1, 0)]
    ended = threading.Event()

    def book() -> None:
        while not ended.is_set():
            for holds in told:
                with writer.lock:
                    writer.note({}, holds, slices)
                time.sleep(0)  # or the other thread hardly ever gets the lock

    booking = threading.Thread(target=book)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        booking.start()
        for _ in range(60):
            writer._rung = -1
            writer._poll()
            assert writer._rung == 0
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        booking.join()
