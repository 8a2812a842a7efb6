"""Hard budgets of many workers: reserved in the shared SQL database, settled in the ledger's own transaction.

One thread per worker takes all reservations that wait together: one transaction locks their budgets in a fixed order,
checks them one by one, and writes each budget once. What a request has spent is booked, and what it still holds is
given back, by the transaction that inserts its row (`SharedBudgets.insert`): counters equal the ledger at every commit,
and nothing that dies in between can lose either.

A worker that dies leaves its holds behind: others count them as spent once it has not been heard of for DEAD_AFTER_S
(`_housekeeping`), and whoever brings its journal into the ledger gives them back (`forget`).
"""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from gateway.admission.budgets import Account, Budget, LocalAccount
from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_account import Claim, SharedAccount
from gateway.errors import Unavailable
from gateway.ledger import budget_rows
from gateway.ledger.budget_rows import HoldRow, Key, Row
from gateway.ledger.records import RequestRecord
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

WAIT_S = 2.0
"""How long a request waits for the database before it is refused."""
BEAT_S = 2.0
DEAD_AFTER_S = 30.0
MAX_BATCH = 512
_NO_BUDGETS = LocalAccount(())


def connect_budgets(url: str) -> Engine:
    """An engine whose statements end within WAIT_S, on connections of its own."""
    if url.startswith("sqlite"):
        engine = create_engine(url, connect_args={"timeout": WAIT_S})
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    limit_ms = int(WAIT_S * 1000)
    return create_engine(
        url,
        connect_args={
            "connect_timeout": int(WAIT_S),
            "tcp_user_timeout": limit_ms,
            "options": f"-c statement_timeout={limit_ms} -c lock_timeout={limit_ms}",
        },
    )


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@dataclass(slots=True)
class _Doubt:
    """A batch whose commit was not answered: it may be in, or not."""

    batch: int
    claims: list[Claim]

    @property
    def scopes(self) -> set[str]:
        return {scope for claim in self.claims for scope, _ in claim.account.keys}


class SharedBudgets:
    """The budgets of one of many workers."""

    def __init__(self, engine: Engine, *, dead_after_s: float = DEAD_AFTER_S) -> None:
        self.life = secrets.token_hex(8)
        """Names what this process holds: its journal carries it, so that whoever replays that can give it back."""
        self._engine = engine
        self._dead_after_s = dead_after_s
        self._beat_s = min(BEAT_S, dead_after_s / 5)
        self._queue: deque[Claim] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._views: WeakValueDictionary[Key, Budget] = WeakValueDictionary()
        self._open: dict[str, SharedAccount] = {}
        # Held from before a transaction locks budgets until what it did is known here too: what accounts say they
        # hold is what SQL says. Taken before any lock on a budget's row, never while one is held.
        self._lock = threading.RLock()
        self._batch = time.time_ns()
        self._doubt: _Doubt | None = None
        self._steady_since = 0.0
        self._beaten = 0.0

    # for the requests -----------------------------------------------------------------------------------------------

    async def find(self, limits: Sequence[BudgetLimit], now_ms: int, request_id: str) -> Account:
        """The account of one request, its budgets as SQL has them now. Raises Unavailable."""
        if not limits:
            return _NO_BUDGETS
        account = SharedAccount(self, request_id, limits, now_ms)
        await self._ask(Claim(account))
        return account

    def all(self) -> list[Budget]:
        """The budgets of the requests under way, as last seen."""
        return list(self._views.values())

    async def reserve(self, claim: Claim) -> Key | None:
        """The budget that was short, or None: held. Raises Unavailable."""
        self._open[claim.account.request_id] = claim.account
        return await self._ask(claim)

    def put(self, claim: Claim) -> None:
        self._queue.append(claim)
        if not self._wake.is_set():
            self._wake.set()

    async def _ask(self, claim: Claim) -> Key | None:
        claim.done = asyncio.get_running_loop().create_future()
        self.put(claim)
        try:
            async with asyncio.timeout(WAIT_S):
                return await claim.done
        except TimeoutError as error:
            raise _away() from error
        finally:
            claim.cancelled = not claim.answered

    # for the ledger -------------------------------------------------------------------------------------------------

    def insert(self, engine: Engine, records: Sequence[RequestRecord], write: Callable[[Connection], set[str]]) -> None:
        """Insert closed requests and book them, in one transaction. Called by the ledger's thread.

        `write` inserts the rows and returns the ids that were not there before: those, and only those, are booked, so
        that a replay changes nothing.
        """
        with contextlib.ExitStack() as stack:
            if engine.dialect.name == "sqlite":  # one writer at a time: whoever waits for `_lock` must not be it
                stack.enter_context(self._lock)
            connection = stack.enter_context(engine.connect())
            transaction = stack.enter_context(connection.begin())
            budget_rows.enter_ledger(connection)
            new = write(connection)
            stack.enter_context(self._lock)
            inserted = [record for record in records if record.id in new]
            accounts = [self._open[record.id] for record in records if record.id in self._open]
            scopes = {scope for record in inserted for scope in budget_rows.scopes_of(record)}
            scopes |= {scope for account in accounts for scope, _ in account.keys}
            scopes |= self._doubtful_scopes()
            held = {scope for account in accounts if account.request_id in new for scope, _ in account.keys}
            rows, holds = budget_rows.lock(connection, scopes, self.life, held)
            self._resolve_doubt(connection)
            budget_rows.book(rows, inserted)
            for account in accounts:
                if account.request_id in new and account.held_nanousd:
                    for key in account.keys:
                        budget_rows.release(rows[key], holds[key], account.held_nanousd)
            with budget_rows.last_words(connection, list(rows.values()), list(holds.values())):
                transaction.commit()
            for account in accounts:  # one that was not new was booked by a commit that went unanswered
                self._close(account)

    def abandon(self, record: RequestRecord) -> None:
        """A row that the database refused for what it is: nothing is booked, what it holds is given back."""
        account = self._open.pop(record.id, None)
        if account is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(account.abandon)

    def _close(self, account: SharedAccount) -> None:
        account.held_nanousd = 0
        account.closed = True
        self._open.pop(account.request_id, None)

    def forget(self, lives: Sequence[str]) -> None:
        """Give back what processes held that are gone: their journals are in the ledger."""
        for life in lives:
            with self._engine.begin() as connection:
                held = budget_rows.forget(connection, life)
            log.warning("budgets.recovered", worker=life, held_nanousd=held)

    # the worker's life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steady_since = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="budget-writer", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """After the ledger's last insertion: what waits is done once more, then the thread ends, and holds nothing."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 3 * WAIT_S)
        self._engine.dispose()

    def statistics(self) -> dict[str, int]:
        return {"open": len(self._open), "waiting": len(self._queue)}

    # the thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._housekeeping()
        while True:
            self._wake.wait(self._beat_s)
            self._wake.clear()
            stopping = self._stopping
            while self._queue:
                claims = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                if not self._serve(claims):
                    break
            if stopping:
                self._end()
                return
            if time.monotonic() - self._beaten >= self._beat_s:
                self._housekeeping()

    def _serve(self, claims: list[Claim]) -> bool:
        """One batch, answered. False when the database did not take it."""
        rows: dict[Key, Row] = {}
        failed: Unavailable | None = None
        try:
            rows = self._transact([claim for claim in claims if not claim.cancelled])
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            log.error("budgets.database_failed", error=reason, waiting=len(claims))
            failed = _away()
            self._engine.dispose()
            doubtful = self._doubt.claims if self._doubt is not None else []
            self._queue.extendleft(c for c in claims if not c.checked and c not in doubtful)  # corrections are not lost
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answer, claims, rows, failed)
        return failed is None

    def _transact(self, claims: list[Claim]) -> dict[Key, Row]:
        """Do the claims; returns the rows they were about."""
        scopes = {scope for claim in claims for scope, _ in claim.account.limits}
        while True:
            rows: dict[Key, Row] = {}
            changing = self._doubt is not None or any(claim.amount for claim in claims)
            if not changing:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    rows = budget_rows.read(connection, scopes, lock=False)
                changing = not _late(rows, claims) and any(_gives(rows, claim) for claim in claims)
            if changing:
                with self._lock:
                    rows = self._change(claims, scopes)
            late = _late(rows, claims)
            if not late:
                return rows
            with self._engine.begin() as connection:
                budget_rows.start(connection, late)

    def _change(self, claims: list[Claim], scopes: set[str]) -> dict[Key, Row]:
        """One transaction, which does nothing where a budget has to be started first."""
        with self._engine.connect() as connection, connection.begin() as transaction:
            held = {scope for claim in claims if claim.amount for scope, _ in claim.account.keys}
            rows, holds = budget_rows.lock(connection, scopes | self._doubtful_scopes(), self.life, held)
            self._resolve_doubt(connection)
            if _late(rows, claims):
                return rows
            self._batch += 1
            changed: set[Key] = set()
            applied: list[Claim] = []
            for claim in sorted(claims, key=_corrections_first):
                if claim.amount == 0:
                    changed.update(_give(rows, claim))
                elif not claim.account.closed and not self._short(rows, claim):
                    for key in claim.account.keys:
                        hold = holds.setdefault(key, HoldRow(self.life, *key))
                        hold.batch = self._batch
                        if claim.amount > 0:
                            rows[key].reserved_nanousd += claim.amount
                            hold.amount_nanousd += claim.amount
                        else:
                            budget_rows.release(rows[key], hold, -claim.amount)
                        changed.add(key)
                    applied.append(claim)
            self._doubt = _Doubt(self._batch, applied) if applied else None
            written = [hold for hold in holds.values() if hold.batch == self._batch]
            with budget_rows.last_words(connection, [rows[key] for key in sorted(changed)], written):
                transaction.commit()
            self._doubt = None
            for claim in applied:
                claim.granted = True
                claim.account.held_nanousd += claim.amount
            return rows

    def _short(self, rows: dict[Key, Row], claim: Claim) -> bool:
        if claim.checked:
            for key in claim.account.keys:
                row = rows[key]
                bounds = [b for b in (claim.account.limits[key].nanousd, row.given_nanousd) if b is not None]
                if claim.amount > min(bounds) - row.spent_nanousd - row.reserved_nanousd:
                    claim.short = key
                    return True
        return False

    def _doubtful_scopes(self) -> set[str]:
        return self._doubt.scopes if self._doubt is not None else set()

    def _resolve_doubt(self, connection: Connection) -> None:
        """Find out whether the batch is in whose commit was not answered. Its budgets are locked: it is over."""
        doubt = self._doubt
        if doubt is None:
            return
        is_in = budget_rows.committed(connection, self.life, doubt.batch)
        self._doubt = None
        for claim in doubt.claims:
            if is_in:
                claim.account.held_nanousd += claim.amount
                if claim.checked and self._loop is not None:
                    self._loop.call_soon_threadsafe(claim.account.granted_late, claim.amount)
            elif not claim.checked:
                self.put(claim)

    def _answer(self, claims: list[Claim], rows: dict[Key, Row], failed: Unavailable | None) -> None:
        """On the loop: what the batch found and did becomes known to its requests."""
        for key, row in rows.items():
            budget = self._views.get(key)
            if budget is not None:
                _show(budget, row)
        for claim in claims:
            account = claim.account
            claim.answered = True
            if claim.amount == 0 and failed is None:
                account.budgets = self._bind(account, rows)
                account.keys = tuple((budget.scope, budget.window) for budget in account.budgets)
            elif claim.amount and claim.checked:
                account.answered(claim.amount, granted=claim.granted)
            if claim.done is not None and not claim.done.done():
                if failed is None:
                    claim.done.set_result(claim.short)
                else:
                    claim.done.set_exception(failed)

    def _bind(self, account: SharedAccount, rows: dict[Key, Row]) -> tuple[Budget, ...]:
        found = []
        for key, limit in account.limits.items():
            row = rows.get(key)
            if row is not None:
                budget = self._views.get(key)
                if budget is None:
                    budget = self._views[key] = Budget(row.scope, 0, row.window, 0, 0)
                _show(budget, row)
                if budget.follow(limit):
                    found.append(budget)
        return tuple(found)

    def _end(self) -> None:
        """A worker that ends in order leaves nothing to reclaim; what the ledger still lacks, its journal names."""
        if not self._open:
            with contextlib.suppress(SQLAlchemyError), self._engine.begin() as connection:
                budget_rows.forget(connection, self.life)

    def _housekeeping(self) -> None:
        """Say that this worker lives, and count as spent what dead ones hold.

        Nobody is called dead by one who was cut off itself: then nobody was heard of.
        """
        now = time.monotonic()
        try:
            with self._lock, self._engine.begin() as connection:
                budget_rows.beat(connection, self.life, socket.gethostname(), os.getpid())
                if self._doubt is None:
                    budget_rows.drop_empty_holds(connection, self.life)
            while now - self._steady_since >= self._dead_after_s:
                with self._engine.begin() as connection:
                    found = budget_rows.reclaim(connection, self._dead_after_s)
                if found is None:
                    break
                log.warning("budgets.reclaimed", worker=found[0], held_nanousd=found[1])
        except Exception as error:
            self._steady_since = now
            log.error("budgets.heartbeat_failed", error=str(error).partition("\n")[0][:200])
        self._beaten = now


def _corrections_first(claim: Claim) -> tuple[bool, bool]:
    """What is given back comes before what is asked: nobody is refused what another one frees in the same batch."""
    return claim.checked, claim.amount > 0


def _late(rows: dict[Key, Row], claims: list[Claim]) -> dict[Key, int]:
    """Budgets to be made, or moved to a new window, before these claims can be done."""
    late: dict[Key, int] = {}
    for claim in claims:
        for key, limit in claim.account.limits.items():
            row = rows.get(key)
            begins = claim.account.starts[key]
            if row is None and limit.nanousd is None and limit.given_nanousd is None:
                continue  # a run that nobody has given a budget
            if (row is None or row.started_ms < begins) and begins >= late.get(key, 0):
                late[key] = begins
    return late


def _gives(rows: dict[Key, Row], claim: Claim) -> bool:
    """Whether a request gives its run another budget than it has."""
    return any(
        limit.given_nanousd is not None and limit.given_nanousd != rows[key].given_nanousd
        for key, limit in claim.account.limits.items()
    )


def _give(rows: dict[Key, Row], claim: Claim) -> list[Key]:
    given = [key for key, limit in claim.account.limits.items() if limit.given_nanousd is not None]
    for key in given:
        rows[key].given_nanousd = claim.account.limits[key].given_nanousd
    return given


def _show(budget: Budget, row: Row) -> None:
    budget.started_ms, budget.spent_nanousd = row.started_ms, row.spent_nanousd
    budget.reserved_nanousd, budget.given_nanousd = row.reserved_nanousd, row.given_nanousd


def _away() -> Unavailable:
    """Says nothing of the database's address: that is for the log."""
    return Unavailable(
        "The database that holds the budgets cannot be asked; no call that costs money is admitted without it. "
        "Retry shortly.",
        retry_after_s=1,
    )
