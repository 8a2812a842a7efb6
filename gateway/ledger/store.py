"""The SQL side of the ledger: rows in batches from one writer thread, reads beside it.

`close_request` returns once the journal has the row; SQL follows within `BATCH_WAIT_S`. A reader who must see its own
writes awaits `flush` first.
"""

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from gateway.errors import Unavailable
from gateway.ledger.claim import DatabaseClaim
from gateway.ledger.journal import Journal
from gateway.ledger.migrations import SchemaTooNew, upgrade
from gateway.ledger.reconcile import INTERVAL_S, adopt_orphans
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.write import Booking, Writer, writer_for
from gateway.settings import Durability
from gateway.telemetry.logs import get_logger

BATCH_ROWS = 256
BATCH_WAIT_S = 0.05
RETRY_WAIT_S = 0.5
FLUSH_TIMEOUT_S = 2.0
REACH_TIMEOUT_S = 1.0
SQLITE_BUSY_S = 5.0
"""How long a statement waits for another connection's lock."""
MAX_PENDING = 100_000
"""Closed requests that may wait for SQL in memory; past that, nothing new is admitted."""

log = get_logger(__name__)
Closed = tuple[RequestRecord, list[AttemptRecord]]


class LedgerUnreachable(RuntimeError):
    """The database does not answer, or does not take its tables; the message says which and why."""


def connect(url: str, durability: Durability = "process") -> Engine:
    """An engine for `url`, its schema brought to the newest version. Raises LedgerUnreachable."""
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_full if durability == "full" else _sqlite_normal)
    else:
        event.listen(engine, "connect", _postgresql_commits)
    try:
        upgrade(engine)
    except (DBAPIError, SchemaTooNew) as error:
        engine.dispose()
        where = engine.url.render_as_string(hide_password=True)
        reason = str(error.orig if isinstance(error, DBAPIError) else error).splitlines()[0]
        raise LedgerUnreachable(f"DATABASE_URL: {where} cannot be used ({reason})") from error
    return engine


def _sqlite_normal(connection: Any, _record: Any) -> None:
    _sqlite_pragmas(connection, "NORMAL")


def _sqlite_full(connection: Any, _record: Any) -> None:
    _sqlite_pragmas(connection, "FULL")


def _sqlite_pragmas(connection: Any, synchronous: str) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_S * 1000:.0f}")
    _enter_wal(cursor)
    cursor.execute(f"PRAGMA synchronous={synchronous}")
    cursor.close()


def _enter_wal(cursor: sqlite3.Cursor) -> None:
    """Switch a new file to WAL; SQLite's busy timeout does not cover two connections that do so at once."""
    until = time.monotonic() + SQLITE_BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _postgresql_commits(connection: Any, _record: Any) -> None:
    """A commit that returned is on the server's disk, whatever the role's default is: the journal forgets it then."""
    connection.execute("SET synchronous_commit = on")
    connection.commit()


class LedgerStore:
    """Writes closed requests; owned by the event loop, with one thread of its own from `start` to `stop`.

    `journals`: the folder of all workers' journals, where orphans are looked for; None: there is none but `journal`.
    `booking`: books the rows in budgets that workers share; None: there are none.
    `claim`: what this process holds of the database, and may lose.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        *,
        journals: Path | None = None,
        durability: Durability = "process",
        booking: Booking | None = None,
        claim: DatabaseClaim | None = None,
    ) -> None:
        self.engine = engine
        self._claim = claim
        self.journal = journal
        self._booking = booking
        if booking is not None:
            journal.sign(booking.life)
        self.full = durability == "full"
        """Whether `durable` has anything to wait for: the hot path asks this first."""
        self._writer: Writer = writer_for(engine)
        self._journals = journals
        self._reconciling: asyncio.Task[None] | None = None
        self._pending: deque[Closed] = deque()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._enqueued = 0
        self._committed = 0
        self._barriers: list[tuple[int, asyncio.Future[None]]] = []
        self._reaching: asyncio.Task[bool] | None = None

    def replay(self) -> int:
        """Bring what a crash left in the journal into SQL; returns how many requests that were. Call before `start`."""
        rows = self.journal.recover()
        self._insert_in_batches(rows)
        if self._booking is not None:
            self._booking.forget(self.journal.lives)
        self.journal.forget()
        return len(rows) + len(self.reconcile())

    def reconcile(self) -> list[RequestRecord]:
        """Bring the journals of dead workers into SQL, what they had in flight closed as `interrupted`. Blocking.

        Returns the requests found. Doing it twice changes nothing; what SQL refuses to take now is left for later.
        """
        if self._journals is None:
            return []
        found: list[RequestRecord] = []
        for orphan in adopt_orphans(self._journals):
            try:
                rows = orphan.rows()
                self._insert_in_batches(rows)
                if self._booking is not None:
                    self._booking.forget(orphan.lives)
            except BaseException:
                orphan.release()
                raise
            orphan.forget()
            found += [request for request, _ in rows]
        return found

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write_batches, name="ledger-writer", daemon=True)
        self._thread.start()
        if self._journals is not None:
            self._reconciling = asyncio.create_task(self._reconcile_for_ever(), name="ledger-reconciler")

    async def durable(self) -> None:
        """Returns when all that the journal has been told survives what the durability mode says. Raises Unavailable.

        Awaited before an attempt goes out and before the end of an answer is handed to its caller, where `full`.
        """
        try:
            await self.journal.synced()
        except OSError as error:
            log.error("journal.sync_failed", error=str(error))
            raise Unavailable("The ledger's disk fails; nothing goes out until it is mended.") from error

    async def stop(self) -> None:
        """Write what is pending, then end the thread and release the journal."""
        if self._reconciling is not None:
            self._reconciling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reconciling
        try:
            await self.flush(timeout_s=10)
        except Unavailable:
            log.warning("ledger.stop_without_flush", pending=len(self._pending))
        self._stopping = True
        self._urgent.set()
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5)
        if self._booking is not None and await self._booking.stop():
            self.journal.unsign()
        self.journal.close()

    @property
    def accepts(self) -> bool:
        """Whether anything may be admitted; `refuses` says why not."""
        return len(self._pending) < MAX_PENDING and (self._claim is None or not self._claim.lost)

    @property
    def refuses(self) -> str:
        """Why nothing is admitted now: SQL is so far behind that more would not be bounded, or another's."""
        if self._claim is not None and self._claim.lost:
            return self._claim.lost
        return "The ledger is too far behind to admit more; retry shortly."

    async def reachable(self, timeout_s: float = REACH_TIMEOUT_S) -> bool:
        """Whether the database answers now. One question at a time, however many ask."""
        if self._reaching is None or self._reaching.done():
            self._reaching = asyncio.create_task(asyncio.to_thread(self._answers), name="ledger-reach")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._reaching)
        except TimeoutError:
            return False

    def _answers(self) -> bool:
        try:
            with self.engine.connect() as connection:
                connection.execute(select(1))
        except SQLAlchemyError as error:
            log.warning("ledger.unreachable", error=str(error)[:300])
            return False
        return True

    def close_request(self, request: RequestRecord, attempts: list[AttemptRecord]) -> None:
        """The final rows of one request: durable in the journal on return, in SQL soon after."""
        try:
            self.journal.closed(request, attempts)
        except (OSError, OverflowError, ValueError) as error:
            log.error("journal.write_failed", error=str(error), request_id=request.id)
        self._pending.append((request, attempts))
        self._enqueued += 1
        if not self._wake.is_set():
            self._wake.set()

    async def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Returns when everything closed before this call is in SQL. Raises Unavailable when that takes too long."""
        if self._committed >= self._enqueued:
            return
        barrier: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append((self._enqueued, barrier))
        self._urgent.set()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await barrier
        except TimeoutError as error:
            raise Unavailable("The ledger's database does not keep up; retry shortly.", retry_after_s=1) from error

    def statistics(self) -> dict[str, int]:
        return {"pending": len(self._pending), "uncommitted": self.journal.uncommitted()}

    def _write_batches(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._pending:
                if len(self._pending) < BATCH_ROWS:
                    self._urgent.wait(BATCH_WAIT_S)
                batch = [self._pending[i] for i in range(min(BATCH_ROWS, len(self._pending)))]
                try:
                    self._insert_all(batch)
                except Exception as error:
                    log.error("ledger.write_failed", error=str(error)[:300], pending=len(self._pending))
                    if self._stopping:
                        return
                    time.sleep(RETRY_WAIT_S)
                    continue
                for _ in batch:
                    self._pending.popleft()
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._on_committed, [request.id for request, _ in batch])
            self._urgent.clear()
            if self._stopping:
                return

    def _on_committed(self, ids: list[str]) -> None:
        self._committed += len(ids)
        self.journal.committed(ids)
        waiting = []
        for goal, barrier in self._barriers:
            if self._committed >= goal:
                if not barrier.done():
                    barrier.set_result(None)
            else:
                waiting.append((goal, barrier))
        self._barriers = waiting
        if waiting:
            self._urgent.set()
            self._wake.set()

    async def _reconcile_for_ever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                found = await asyncio.to_thread(self.reconcile)
            except Exception as error:
                log.error("ledger.reconcile_failed", error=str(error)[:300])
            else:
                if found:
                    log.warning("ledger.reconciled", requests=len(found))

    def _insert_in_batches(self, rows: Sequence[Closed]) -> None:
        for at in range(0, len(rows), BATCH_ROWS):
            self._insert_all(rows[at : at + BATCH_ROWS])

    def _insert_all(self, rows: Sequence[Closed]) -> None:
        """All rows; one that the database refuses for what it is does not hold up the others: it goes to the log."""
        try:
            self._writer.insert(rows, self._booking)
        except self._writer.away:
            raise  # all of it again, later
        except (self._writer.refused, OverflowError, ValueError):
            if len(rows) > 1:
                for row in rows:
                    self._insert_all([row])
            else:
                self._insert_fitted(rows[0])

    def _insert_fitted(self, row: Closed) -> None:
        try:
            self._writer.insert([row], self._booking, fitted=True)
        except self._writer.away:
            raise
        except (self._writer.refused, OverflowError, ValueError) as error:
            if self._booking is not None:
                self._booking.abandon(row[0])
            log.error("ledger.row_refused", error=str(error)[:300], row=repr(row))
