"""Slices of shared budgets: reserved in memory while much is left, and never in anybody's way."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError

from gateway.admission import budget_writer, shared_budgets
from gateway.admission.budgets import Account, Reservation, degrade, tightest
from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_budgets import DEAD_AFTER_S, TRUST_S
from gateway.admission.slices import SHARE, Slice
from gateway.errors import BudgetExceeded, Unavailable
from gateway.ledger import budget_rows
from gateway.ledger.budget_rows import Key
from gateway.ledger.store import connect
from routers.policy import Threshold
from tests.admission.books import snapshot
from tests.admission.test_budgets import DAY_MS, NOON
from tests.admission.test_budgets_shared import Worker, _blocked, _break_one_commit, call_of, engine, running, url

__all__ = ["engine", "url"]
anyio = pytest.mark.anyio
KEY: Key = ("key:k", "total")
CALL = 1_000
MUCH = BudgetLimit("key:k", "total", 1_000_000, "key:k")


def row_of(engine: Engine) -> budget_rows.Row:
    with snapshot(engine) as connection:
        assert budget_rows.integrity(connection) == []
        return budget_rows.read(connection, ["key:k"], lock=False)[KEY]


def slice_of(worker: Worker) -> Slice:
    return worker.budgets._slices[KEY]


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def beaten(worker: Worker) -> None:
    """It has said that it lives, and knows how many others do."""
    await until(lambda: worker.budgets._writer.beaten_s > 0)


async def kept(worker: Worker, limit: BudgetLimit = MUCH, now_ms: int = NOON) -> Account:
    """An account of a worker that keeps a slice."""
    await beaten(worker)
    account = await worker.budgets.find([limit], now_ms, "first")
    (await account.reserve(CALL)).settle(0)
    assert slice_of(worker).keeps
    return account


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is now, the other worker's answer is waited for."""
    monkeypatch.setattr(budget_writer, "RECALL_S", 20.0)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice stays, and is trusted, though this machine stands still for a while."""
    monkeypatch.setattr(shared_budgets, "IDLE_S", 1e9)
    monkeypatch.setattr(shared_budgets, "TRUST_S", 1e9)


class SliceMachine(RuleBasedStateMachine):
    """Two workers that keep slices, against plain arithmetic: who is let through, and what is left in the end."""

    @initialize(limit=st.integers(10, 4_000))
    def start(self, limit: int) -> None:
        self.limit, self.spent, self.serial = limit * CALL, 0, 0
        self.home = Path(tempfile.mkdtemp(prefix="leadline-slices-"))
        self.engine = connect(f"sqlite:///{self.home / 'ledger.db'}")
        self.loop = asyncio.new_event_loop()
        self.workers = [Worker(f"sqlite:///{self.home / 'ledger.db'}", self.home, name) for name in ("w0", "w1")]
        self.running: list[tuple[Worker, Account, Reservation]] = []
        for worker in self.workers:
            self.loop.run_until_complete(worker.start())
            self.loop.run_until_complete(beaten(worker))

    @property
    def left(self) -> int:
        return self.limit - self.spent - sum(hold.amount_nanousd for _, _, hold in self.running)

    def reserve(self, worker: Worker, amount: int) -> None:
        self.serial += 1
        limit = BudgetLimit("key:k", "total", self.limit, "key:k")
        account = self.loop.run_until_complete(worker.budgets.find([limit], NOON, f"r{self.serial}"))
        fits = amount <= self.left
        try:
            self.running.append((worker, account, self.loop.run_until_complete(account.reserve(amount))))
        except BudgetExceeded:
            assert not fits, "refused although it fitted"
        else:
            assert fits, "let through although it did not fit"

    @rule(which=st.integers(0, 1), amount=st.integers(1, 3 * CALL), calls=st.integers(1, 30))
    def calls_come(self, which: int, amount: int, calls: int) -> None:
        for _ in range(calls):
            self.reserve(self.workers[which], amount)

    @rule(which=st.integers(0, 1), over=st.integers(0, 1), less=st.integers(0, CALL))
    def one_wants_all(self, which: int, over: int, less: int) -> None:
        self.reserve(self.workers[which], max(1, self.left - less + over))

    @rule(share=st.floats(0, 1), calls=st.integers(1, 60))
    def calls_end(self, share: float, calls: int) -> None:
        for _ in range(min(calls, len(self.running))):
            worker, account, hold = self.running.pop(0)
            cost = int(hold.amount_nanousd * share)
            self.loop.run_until_complete(settle(hold, cost))
            worker.insert(call_of(account.request_id, account), cost)  # type: ignore[attr-defined]
            self.spent += cost
        for worker in self.workers:
            self.loop.run_until_complete(worker.settled())

    @rule(limit=st.integers(10, 4_000))
    def the_limit_changes(self, limit: int) -> None:
        self.limit = limit * CALL

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine") and self.running:
            row = row_of(self.engine)
            assert row.spent_nanousd == self.spent
            assert row.reserved_nanousd >= sum(hold.amount_nanousd for _, _, hold in self.running)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.calls_end(1.0, len(self.running))
            for worker in self.workers:
                self.loop.run_until_complete(worker.stop())
            if self.serial:
                row = row_of(self.engine)
                assert (row.spent_nanousd, row.reserved_nanousd) == (self.spent, 0)
            self.loop.close()
            self.engine.dispose()
            shutil.rmtree(self.home)


async def settle(hold: Reservation, cost: int) -> None:
    hold.settle(cost)


TestSlices = pytest.mark.usefixtures("patient")(SliceMachine.TestCase)
TestSlices.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


@anyio
@pytest.mark.usefixtures("steady")
async def test_calls_are_reserved_in_memory_while_much_is_left(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        worker.budgets._fresh_s = 1e9
        await kept(worker)
        held = row_of(engine).reserved_nanousd
        assert CALL < held <= MUCH.nanousd / SHARE  # type: ignore[operator]
        writer = worker.budgets._writer
        writer._next_beat_s = writer.beaten_s = 1e18
        statements: list[str] = []
        event.listen(worker.budgets._engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        for number in range(100):
            account = await worker.budgets.find([MUCH], NOON, f"r{number}")
            hold = await account.reserve(CALL)
            budget = tightest(account.budgets)
            assert budget is not None
            assert budget.remaining_nanousd == 1_000_000 - CALL, "one's own slice is not used"
            hold.settle(0)
        assert [one for one in statements if "worker.recalls" not in one and "BEGIN" not in one] == []
        assert row_of(engine).reserved_nanousd == held


@anyio
@pytest.mark.usefixtures("steady")
async def test_a_slice_is_filled_before_it_is_empty(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        await kept(worker)
        for number in range(200):
            account = await worker.budgets.find([MUCH], NOON, f"r{number}")
            (await account.reserve(CALL)).settle(CALL)
            await asyncio.to_thread(worker.insert, call_of(f"r{number}", account), CALL)
        row = row_of(engine)
        assert row.spent_nanousd == 200 * CALL
        assert row.spent_nanousd + row.reserved_nanousd <= 1_000_000
        await until(lambda: slice_of(worker).asked == 0)
        assert slice_of(worker).free > 0


@anyio
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("busy", [0, 3])
async def test_what_one_worker_does_not_use_is_there_for_another(
    url: str, engine: Engine, tmp_path: Path, busy: int
) -> None:
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as other:
        account = await kept(one)
        used = [await account.reserve(CALL) for _ in range(busy)]
        await beaten(other)
        asking = await other.budgets.find([MUCH], NOON, "r")
        left = 1_000_000 - busy * CALL
        with pytest.raises(BudgetExceeded):
            await asking.reserve(left + 1)
        await asking.reserve(left)
        assert row_of(engine).reserved_nanousd == 1_000_000
        assert row_of(engine).spare_nanousd == 0
        with pytest.raises(BudgetExceeded):
            await account.reserve(1)
        for hold in used:
            hold.settle(0)
        await one.settled()
        assert row_of(engine).reserved_nanousd == left


@anyio
async def test_a_slice_that_nobody_uses_goes_back(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        await kept(worker)
        await until(lambda: row_of(engine).reserved_nanousd == 0)
        await until(lambda: worker.budgets.all() == [])


@anyio
async def test_little_is_left_and_nothing_is_kept(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await kept(worker)
        hold = await account.reserve(900_000)
        await until(lambda: not slice_of(worker).keeps)
        await worker.settled()
        assert row_of(engine).reserved_nanousd == 900_000
        hold.settle(0)


@anyio
async def test_a_lower_limit_holds_at_once(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        first = await kept(worker)
        await first.reserve(5 * CALL)
        lower = BudgetLimit("key:k", "total", 6 * CALL, "key:k")
        account = await worker.budgets.find([lower], NOON, "r")
        await account.reserve(CALL)
        with pytest.raises(BudgetExceeded):
            await account.reserve(1)
        await worker.settled()
        assert row_of(engine).reserved_nanousd == 6 * CALL


@anyio
async def test_a_slice_outlives_its_window(url: str, engine: Engine, tmp_path: Path) -> None:
    daily = BudgetLimit("key:k", "day", 1_000_000, "key:k")
    async with running(url, tmp_path) as worker:
        await beaten(worker)
        account = await worker.budgets.find([daily], NOON, "r0")
        (await account.reserve(CALL)).settle(CALL)
        worker.insert(call_of("r0", account), CALL)
        account = await worker.budgets.find([daily], NOON + DAY_MS, "r1")
        assert account.budgets[0].spent_nanousd == 0
        hold = await account.reserve(CALL)
        call = call_of("r1", account)
        call.record.created_at_ms += DAY_MS
        hold.settle(CALL)
        worker.insert(call, CALL)
        with snapshot(engine) as connection:
            assert budget_rows.integrity(connection) == []
            row = budget_rows.read(connection, ["key:k"], lock=False)["key:k", "day"]
        assert row.spent_nanousd == CALL
        assert row.reserved_nanousd == row.spare_nanousd


@anyio
@pytest.mark.usefixtures("hasty")
async def test_a_slice_is_not_trusted_without_its_database(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await kept(worker)
        with _blocked(url):
            await until(lambda: not worker.budgets._trusted(time.monotonic()))
            with pytest.raises(Unavailable):
                await account.reserve(CALL)
        await until(lambda: worker.budgets._trusted(time.monotonic()))
        (await account.reserve(CALL)).settle(0)


def test_a_slice_is_given_up_long_before_others_count_it_as_spent() -> None:
    assert TRUST_S * 5 < DEAD_AFTER_S


@anyio
@pytest.mark.parametrize("lost_before", [False, True])
async def test_a_filling_that_was_not_answered_is_there_or_not(
    url: str, engine: Engine, tmp_path: Path, lost_before: bool
) -> None:
    async with running(url, tmp_path) as worker:
        await beaten(worker)
        worker.budgets._writer._next_beat_s = 1e18
        account = await worker.budgets.find([MUCH], NOON, "r")
        _break_one_commit(worker.budgets._engine, before=lost_before)
        with pytest.raises(Unavailable):
            await account.reserve(CALL)
        hold = await account.reserve(CALL)
        one = slice_of(worker)
        await worker.settled()
        await until(lambda: one.asked == 0)
        assert row_of(engine).reserved_nanousd == one.free + CALL
        hold.settle(0)


@anyio
async def test_a_worker_that_was_thought_dead_gives_its_slice_back(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await kept(worker)
        hold = await account.reserve(CALL)
        with engine.begin() as connection:
            held = budget_rows.read(connection, ["key:k"], lock=False)[KEY].reserved_nanousd
            connection.execute(text("UPDATE worker SET heartbeat_ms = 0"))
            assert budget_rows.reclaim(connection, DEAD_AFTER_S) == (worker.budgets.life, held)
        assert row_of(engine).spent_nanousd == held
        await until(lambda: row_of(engine).spent_nanousd == CALL)  # said at the next heartbeat
        hold.settle(0)
        await until(lambda: row_of(engine).spent_nanousd == 0)


@anyio
async def test_thresholds_do_not_count_what_is_kept(url: str, engine: Engine, tmp_path: Path) -> None:
    limit = BudgetLimit("key:k", "total", 1_000_000, "key:k", (Threshold(30, "local"),))
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as other:
        account = await kept(one, limit)
        await account.reserve(299_000)
        await one.settled()
        assert degrade((await other.budgets.find([limit], NOON, "r1")).budgets) is None
        await account.reserve(CALL)
        found = degrade((await one.budgets.find([limit], NOON, "r2")).budgets)
        assert found is not None


@anyio
async def test_a_statement_that_fails_where_budgets_are_written_undoes_all_of_them(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    async with running(url, tmp_path) as worker:
        account = await kept(worker)
        before = row_of(engine)
        hold = await account.reserve(CALL)
        with engine.begin() as connection:
            for statement in _REFUSE[engine.dialect.name]:
                connection.exec_driver_sql(statement)
        with pytest.raises(Unavailable):
            await account.reserve(300_000)
        hold.settle(CALL // 2)
        with pytest.raises(DBAPIError):  # it goes in later
            worker.insert(call_of("first", account), CALL // 2)
        with engine.begin() as connection:
            on = " ON worker_hold" if engine.dialect.name == "postgresql" else ""
            connection.exec_driver_sql(f"DROP TRIGGER refuse{on}")
        assert row_of(engine) == before
        other = await worker.budgets.find([MUCH], NOON, "s")
        await other.reserve(300_000)
        one = slice_of(worker)
        await until(lambda: one.asked == 0)
        await worker.settled()
        row = row_of(engine)
        assert row.spent_nanousd == 0
        assert row.reserved_nanousd == one.free + one.in_use == one.free + 300_000 + CALL // 2


_REFUSE = {
    "postgresql": (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON worker_hold FOR EACH ROW EXECUTE FUNCTION refuse()",
    ),
    "sqlite": ("CREATE TRIGGER refuse BEFORE INSERT ON worker_hold BEGIN SELECT RAISE(ABORT, 'no'); END",),
}
