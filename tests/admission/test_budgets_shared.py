"""Shared budgets in SQL: the same calls as the plain arithmetic, whoever dies, leaves, or cannot be reached."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from gateway.admission import slices
from gateway.admission.budgets import Account, Reservation, degrade, tightest
from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_budgets import SharedBudgets, connect_budgets
from gateway.errors import BudgetExceeded, Unavailable
from gateway.ledger import budget_rows
from gateway.ledger.journal import Journal
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import NO_USAGE
from gateway.ledger.store import LedgerStore, connect
from gateway.settings import Settings
from routers.policy import Threshold
from routers.units import Window
from tests.admission.books import snapshot
from tests.admission.test_budgets import DAY_MS, NOON, RUNS

anyio = pytest.mark.anyio
KEY = BudgetLimit("key:k", "total", 100, "key:k")


@dataclass
class Call:
    """One request of the machine, and what it should hold."""

    record: RequestRecord
    account: Account
    bounds: dict[tuple[str, Window], BudgetLimit]
    running: list[Reservation] = field(default_factory=list)
    spent: int = 0

    @property
    def in_use(self) -> int:
        return self.spent + sum(hold.amount_nanousd for hold in self.running)


class Worker:
    """Shared budgets and the ledger that books them, on one database."""

    def __init__(self, url: str, home: Path, name: str) -> None:
        self.budgets = SharedBudgets(connect_budgets(url), fresh_s=0.0)
        self.ledger = LedgerStore(create_engine(url), Journal(home / name), booking=self.budgets)
        self.calls: list[Call] = []

    async def start(self) -> None:
        self.ledger.replay()
        self.budgets.start()

    async def settled(self) -> None:
        """What this worker gives back is in SQL."""
        await asyncio.sleep(0)
        await self.budgets.find([BudgetLimit("scope:k:none", "total", None, "")], NOON, "last")

    def insert(self, call: Call, cost: int) -> None:
        """As the ledger's thread does; twice, as after a commit that was not answered."""
        attempt = AttemptRecord(f"{call.record.id}-0", call.record.id, 0, "m", "p", call.record.created_at_ms)
        attempt.bill(NO_USAGE, cost)
        call.record.total([attempt])
        for _ in range(2):
            self.ledger._insert_all([(call.record, [attempt])])

    async def stop(self) -> None:
        await self.ledger.stop()
        self.ledger.engine.dispose()


class SharedBudgetMachine(RuleBasedStateMachine):
    """Two workers on one database against plain arithmetic: settled calls hold what they cost until they are booked."""

    @initialize(key=st.integers(0, 300), root=st.none() | st.integers(0, 200))
    def start(self, key: int, root: int | None) -> None:
        self.now, self.key, self.root, self.serial = NOON, key, root, 0
        self.home = Path(tempfile.mkdtemp(prefix="leadline-budgets-"))
        self.url = f"sqlite:///{self.home / 'ledger.db'}"
        self.engine = connect(self.url)
        self.loop = asyncio.new_event_loop()
        self.workers = [Worker(self.url, self.home, name) for name in ("w0", "w1")]
        self.given: dict[tuple[str, Window], int] = {}
        self.started: dict[tuple[str, Window], int] = {}
        self.booked: list[RequestRecord] = []
        for worker in self.workers:
            self.loop.run_until_complete(worker.start())

    def used(self, key: tuple[str, Window]) -> tuple[int, int]:
        """(spent, reserved) as they should be."""
        counted = [
            r for r in self.booked if key[0] in budget_rows.scopes_of(r) and r.created_at_ms >= self.started[key]
        ]
        held = [call.in_use for worker in self.workers for call in worker.calls if key in call.bounds]
        return sum(record.cost_nanousd or 0 for record in counted), sum(held)

    @rule(which=st.integers(0, 1), run=st.none() | st.sampled_from(RUNS), given=st.none() | st.integers(0, 150))
    def admit(self, which: int, run: str | None, given: int | None) -> None:
        limits = [BudgetLimit("key:k", "day", self.key, "key:k")]
        parts = run.split("/") if run else []
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            own = given if depth == len(parts) else None
            limits.append(
                BudgetLimit(f"scope:k:{path}", "total", self.root if depth == 1 else None, path, given_nanousd=own)
            )
        self.serial += 1
        record = RequestRecord(f"r{self.serial}", self.now, "t", "k", "chat", False, "m", scope=run)
        worker = self.workers[which]
        account = self.loop.run_until_complete(worker.budgets.find(limits, self.now, record.id))
        bounds = {}
        for limit in limits:
            key = (limit.scope, limit.window)
            if limit.given_nanousd is not None:
                self.given[key] = limit.given_nanousd
            if limit.nanousd is not None or key in self.given:
                bounds[key] = limit
                start = self.now - self.now % DAY_MS if limit.window == "day" else 0
                self.started[key] = max(start, self.started.get(key, 0))
        assert {(b.scope, b.window): (b.spent_nanousd, b.reserved_nanousd) for b in account.budgets} == {
            key: self.used(key) for key in bounds
        }
        worker.calls.append(Call(record, account, bounds))

    @rule(which=st.integers(0, 1), at=st.integers(0), amount=st.integers(0, 120))
    def reserve(self, which: int, at: int, amount: int) -> None:
        worker = self.workers[which]
        if not worker.calls:
            return
        call = worker.calls[at % len(worker.calls)]
        fits = amount == 0
        if not fits:
            left = []
            for key, limit in call.bounds.items():
                limits = [b for b in (limit.nanousd, self.given.get(key)) if b is not None]
                left.append(min(limits) - sum(self.used(key)))
            fits = all(amount <= one for one in left)
        try:
            hold = self.loop.run_until_complete(call.account.reserve(amount))
        except BudgetExceeded:
            assert not fits, "refused although it fitted"
            return
        assert fits, "let through although it did not fit"
        call.running.append(hold)

    @rule(which=st.integers(0, 1), at=st.integers(0), share=st.floats(0, 1), close=st.booleans())
    def settle(self, which: int, at: int, share: float, close: bool) -> None:
        worker = self.workers[which]
        if not worker.calls:
            return
        call = worker.calls[at % len(worker.calls)]
        while call.running:
            hold = call.running.pop()
            cost = int(hold.amount_nanousd * share)
            self.loop.run_until_complete(_settle(hold, cost))
            call.spent += cost
            if not close:
                break
        self.loop.run_until_complete(worker.settled())
        if close:
            worker.calls.remove(call)
            worker.insert(call, call.spent)
            self.booked.append(call.record)

    @rule(which=st.integers(0, 1), found_dead=st.booleans())
    def worker_dies(self, which: int, found_dead: bool) -> None:
        """Its journal says what its calls can have cost, when its next life starts."""
        old = self.workers[which]
        for call in old.calls:  # as its journal has it: under way, and dispatched with the most it can cost
            old.ledger.journal.opened(call.record)
            attempt = AttemptRecord(f"{call.record.id}-0", call.record.id, 0, "m", "p", call.record.created_at_ms)
            attempt.bill(NO_USAGE, call.in_use)
            old.ledger.journal.dispatched(attempt)
            self.booked.append(call.record)
        life, alive = old.budgets.life, bool(old.budgets._open)
        self.loop.run_until_complete(old.stop())
        if found_dead:
            with self.engine.begin() as connection:
                connection.execute(text("UPDATE worker SET heartbeat_ms = 0 WHERE id = :id"), {"id": life})
                found = budget_rows.reclaim(connection, 30.0)
                assert (found is not None) == alive
                assert budget_rows.reclaim(connection, 30.0) is None
            with snapshot(self.engine) as connection:
                assert budget_rows.integrity(connection) == []
        new = self.workers[which] = Worker(self.url, self.home, f"w{which}")
        self.loop.run_until_complete(new.start())
        for call in old.calls:
            call.record.cost_nanousd = call.in_use

    @rule(key=st.integers(0, 300), root=st.none() | st.integers(0, 200))
    def policy_changes(self, key: int, root: int | None) -> None:
        self.key, self.root = key, root

    @rule(days=st.integers(0, 2))
    def time_passes(self, days: int) -> None:
        self.now += days * DAY_MS

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "engine"):
            return
        with snapshot(self.engine) as connection:
            assert budget_rows.integrity(connection) == []
            rows = budget_rows.read(connection, {scope for scope, _ in self.started}, lock=False)
        assert {key: (row.spent_nanousd, row.reserved_nanousd) for key, row in rows.items()} == {
            key: self.used(key) for key in self.started
        }

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            for worker in self.workers:
                self.loop.run_until_complete(worker.stop())
            self.loop.close()
            self.engine.dispose()
            shutil.rmtree(self.home)


async def _settle(hold: Reservation, cost: int) -> None:
    hold.settle(cost)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker keeps a slice, however small the calls are: what is reserved is what they hold."""
    monkeypatch.setattr(slices, "LEAST_CALLS", 1 << 40)


TestSharedBudgets = pytest.mark.usefixtures("exact")(SharedBudgetMachine.TestCase)
TestSharedBudgets.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.fixture
def url(database_url: str) -> str:
    return Settings.from_env({"DATABASE_URL": database_url}).database_url


@pytest.fixture
def engine(url: str) -> Any:
    engine = connect(url)
    yield engine
    engine.dispose()


@contextlib.asynccontextmanager
async def running(url: str, home: Path, name: str = "w") -> AsyncIterator[Worker]:
    worker = Worker(url, home, name)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def call_of(request_id: str, account: Account) -> Call:
    return Call(RequestRecord(request_id, NOON, "t", "k", "chat", False, "m"), account, {})


def held(engine: Engine) -> tuple[int, int]:
    with snapshot(engine) as connection:
        assert budget_rows.integrity(connection) == []
        row = budget_rows.read(connection, ["key:k"], lock=False)["key:k", "total"]
    return row.spent_nanousd, row.reserved_nanousd


@anyio
async def test_what_a_retry_needs_is_held_beside_what_was_spent(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await worker.budgets.find([KEY], NOON, "r")
        first, hedge = await asyncio.gather(account.reserve(40), account.reserve(30))
        first.settle(10)
        await worker.settled()
        assert held(engine) == (0, 40)
        with pytest.raises(RuntimeError, match="once"):
            first.settle(10)
        with pytest.raises(BudgetExceeded, match=r"\$0.00000006 left"):
            await account.reserve(61)
        retry = await account.reserve(60)
        assert held(engine) == (0, 100)
        budget = tightest(account.budgets)
        assert budget is not None
        assert budget.remaining_nanousd == 0
        hedge.settle(0)
        retry.settle(65)  # dearer than it can be
        await worker.settled()
        assert held(engine) == (0, 75)
        worker.insert(call_of("r", account), 75)
        assert held(engine) == (75, 0)


@anyio
async def test_a_call_that_can_cost_nothing_asks_no_database(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        assert (await worker.budgets.find([], NOON, "r0")).budgets == ()
        account = await worker.budgets.find([BudgetLimit("key:k", "total", 0, "key:k")], NOON, "r1")
        statements: list[str] = []
        event.listen(worker.budgets._engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        hold = await account.reserve(0)
        hold.settle(0)
        assert [one for one in statements if "worker" not in one] == []
        with pytest.raises(BudgetExceeded):
            await account.reserve(1)


@anyio
async def test_a_caller_who_leaves_while_it_waits_leaves_no_hold(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        accounts = [await worker.budgets.find([KEY], NOON, f"r{i}") for i in range(30)]
        for turns, account in enumerate(accounts):
            asking = asyncio.create_task(account.reserve(3))
            for _ in range(turns % 3):
                await asyncio.sleep(0)
            if turns % 5 == 4:
                await asyncio.sleep(0.002)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await asking).settle(0)
        await worker.settled()
        await asyncio.sleep(0)
        await worker.settled()
        assert held(engine) == (0, 0)
        await accounts[0].reserve(100)


@anyio
async def test_a_commit_that_was_not_answered_holds_once_or_not_at_all(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    async with running(url, tmp_path) as worker:
        await worker.settled()
        while not worker.budgets._writer.beaten_s > 0:
            await asyncio.sleep(0.01)
        worker.budgets._writer._next_beat_s = 1e18  # the commit to lose is a reservation's
        for number, lost_before in enumerate((False, True)):
            account = await worker.budgets.find([KEY], NOON, f"r{number}")
            commits = _break_one_commit(worker.budgets._engine, before=lost_before)
            with pytest.raises(Unavailable, match="budgets cannot be asked; no call"):  # no word of where it is
                await account.reserve(50)
            assert commits == [lost_before]
            other = await worker.budgets.find([KEY], NOON, f"s{number}")
            hold = await other.reserve(40)  # the next batch finds out whether the lost one is in
            await worker.settled()
            assert held(engine) == (0, 40)
            hold.settle(0)
            await worker.settled()


def _break_one_commit(engine: Engine, *, before: bool) -> list[bool]:
    """The next transaction's answer is lost, before or after it is in."""
    broken: list[bool] = []
    dialect: Any = engine.dialect
    commit = type(dialect).do_commit

    def do_commit(connection: Any) -> None:
        del dialect.do_commit
        broken.append(before)
        if not before:
            commit(dialect, connection)
        raise OperationalError("COMMIT", {}, Exception("connection lost"))

    dialect.do_commit = do_commit
    return broken


@anyio
@pytest.mark.usefixtures("hasty")
async def test_without_its_database_no_call_that_costs_money_is_admitted(url: str, tmp_path: Path) -> None:
    connect(url).dispose()
    async with running(url, tmp_path) as worker:
        account = await worker.budgets.find([KEY], NOON, "r")
        with _blocked(url):
            with pytest.raises(Unavailable, match="no call that costs money") as caught:
                async with asyncio.timeout(60):
                    await account.reserve(1)
            assert caught.value.retry_after_s
            (await account.reserve(0)).settle(0)
        async with asyncio.timeout(60):
            while True:  # comes back by itself
                with contextlib.suppress(Unavailable):
                    (await account.reserve(1)).settle(0)
                    break
                await asyncio.sleep(0.02)


@contextlib.contextmanager
def _blocked(url: str) -> Any:
    """Somebody holds what every reservation needs."""
    engine = create_engine(url)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.exec_driver_sql("UPDATE budget SET spent_nanousd = spent_nanousd")
        else:
            connection.exec_driver_sql("LOCK TABLE budget IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()
    engine.dispose()


@anyio
async def test_a_worker_that_was_thought_dead_settles_what_it_held(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await worker.budgets.find([KEY], NOON, "r")
        hold = await account.reserve(60)
        with engine.begin() as connection:
            connection.execute(text("UPDATE worker SET heartbeat_ms = 0"))
            assert budget_rows.reclaim(connection, 30.0) == (worker.budgets.life, 60)
        assert held(engine) == (60, 0)
        hold.settle(20)
        await worker.settled()
        assert held(engine) == (20, 0)
        worker.insert(call_of("r", account), 20)
        assert held(engine) == (20, 0)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT SUM(reclaimed_nanousd) FROM worker_hold")).scalar() == 0


@anyio
async def test_a_row_that_sql_refuses_holds_nothing(url: str, engine: Engine, tmp_path: Path) -> None:
    async with running(url, tmp_path) as worker:
        account = await worker.budgets.find([KEY], NOON, "r")
        (await account.reserve(60)).settle(20)
        call = call_of("r", account)
        call.record.input_tokens = 1 << 70
        call.record.outcome = "ok"
        worker.ledger._insert_all([(call.record, [])])
        await asyncio.sleep(0)
        await worker.settled()
        assert held(engine) == (0, 0)
        assert worker.budgets.statistics() == {"open": 0, "waiting": 0}


@anyio
async def test_thresholds_read_what_all_workers_use(url: str, engine: Engine, tmp_path: Path) -> None:
    limit = BudgetLimit("key:k", "total", 100, "key:k", (Threshold(80, "local"),))
    async with running(url, tmp_path, "a") as one, running(url, tmp_path, "b") as other:
        account = await one.budgets.find([limit], NOON, "r1")
        assert degrade(account.budgets) is None
        await account.reserve(80)
        found = degrade((await other.budgets.find([limit], NOON, "r2")).budgets)
        assert found is not None
        assert found[0] == "local"
