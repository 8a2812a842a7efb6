"""The thread that takes one worker's orders about shared budgets to SQL, all that wait together in one transaction.

The transaction locks the budgets in a fixed order, does the orders one by one, and writes each budget once. What it did
is told to the event loop in the order in which it was committed.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from gateway.admission.budget_batch import Batch, Changes, gives, keys_of, late_of, moves_first, short_of, slices_of
from gateway.admission.shared_account import Fill, Look, Move, Order, Take
from gateway.admission.slices import Slice
from gateway.errors import Unavailable
from gateway.ledger import budget_rows
from gateway.ledger.budget_rows import HoldRow, Key, Row
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

WAIT_S = 2.0
"""How long a request waits for the database before it is refused."""
BEAT_S = 2.0
POLL_S = 0.1
"""How soon a worker that keeps a slice hears of a recall."""
RECALL_S = 1.0
"""How long a request waits for other workers to give back what they do not use."""
RETRY_S = 0.02
MAX_BATCH = 512


class BudgetWriter:
    """`tell(batch, failed, certain)` is called when a batch is over: again, with `certain`, where it was not certain
    whether it is in. `tell_beat(known)` is called after each heartbeat."""

    def __init__(
        self,
        engine: Engine,
        *,
        dead_after_s: float,
        tell: Callable[[Batch, Unavailable | None, bool], None],
        tell_beat: Callable[[bool], None],
    ) -> None:
        self.engine = engine
        self.life = secrets.token_hex(8)
        """Names what this process holds: its journal carries it, so that whoever replays that can give it back."""
        self.beat_s = min(BEAT_S, dead_after_s / 5)
        self.queue: deque[Order] = deque()
        self.lock = threading.RLock()
        """Held from before a transaction locks budgets until what it did is known here too. Taken before any lock on a
        budget's row, never while one is held."""
        self.workers = 1
        """How many share the budgets."""
        self.heard_s = -1e9
        """When the database was last heard of."""
        self.beaten_s = -1e9
        """When it was last told that this worker lives."""
        self._dead_after_s = dead_after_s
        self._tell, self._tell_beat = tell, tell_beat
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="budget-writer", daemon=True)
        self._keeping: dict[Key, Slice] = {}
        """The slices that SQL says are kept."""
        self._waiting: list[Take] = []
        self._number = time.time_ns()
        self._doubt: Batch | None = None
        """A batch whose commit was not answered: it may be in, or not."""
        self._steady_since_s = 0.0
        self._next_beat_s = self._next_poll_s = 0.0
        self._rung = 0

    def start(self) -> None:
        self._steady_since_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """What waits is done once more, then the thread ends. Blocking."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(3 * WAIT_S)
        self.engine.dispose()

    def put(self, order: Order) -> None:
        self.queue.append(order)
        if not self._wake.is_set():
            self._wake.set()

    # what other threads need under the lock -----------------------------------------------------------------------

    def doubtful_scopes(self) -> set[str]:
        return self._doubt.scopes if self._doubt is not None else set()

    def resolve_doubt(self, connection: Connection) -> None:
        """Find out whether the batch is in whose commit was not answered. Its budgets are locked: it is over."""
        doubt = self._doubt
        if doubt is None:
            return
        if not budget_rows.committed(connection, self.life, doubt.number):
            self._undo(doubt)
        self._doubt = None
        self._tell(doubt, None, True)

    def note(self, rows: dict[Key, Row], holds: dict[Key, HoldRow], slices: Iterable[Slice]) -> None:
        """What a committed transaction has read and written of these budgets."""
        now_s = time.monotonic()
        for one in slices:
            if one.key in holds:
                one.told = holds[one.key].spare_nanousd
                if one.told:
                    self._keeping[one.key] = one
                else:
                    self._keeping.pop(one.key, None)
            if one.key in rows:
                one.heard(rows[one.key], now_s)
        self.heard_s = now_s

    # the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._beat()
        while True:
            self._wake.wait(RETRY_S if self._waiting else min(self.beat_s, POLL_S) if self._keeping else self.beat_s)
            self._wake.clear()
            stopping = self._stopping
            while self.queue:
                orders = [self.queue.popleft() for _ in range(min(MAX_BATCH, len(self.queue)))]
                if not self._serve(orders):
                    break
            if self._waiting:
                self._serve([])
            now_s = time.monotonic()
            if self._keeping and now_s >= self._next_poll_s:
                self._poll()
            if stopping:
                return
            if now_s >= self._next_beat_s:
                self._beat()
                if self._doubt is not None:
                    self._serve([])

    def _serve(self, orders: list[Order]) -> bool:
        """One batch, with the requests that wait for a recall. False when the database did not take it."""
        self._number += 1
        batch = Batch(self._number, [*self._waiting, *orders])
        self._waiting = []
        failed: Unavailable | None = None
        try:
            self._transact(batch)
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            log.error("budgets.database_failed", error=reason, waiting=len(batch.orders))
            failed = away()
            self.heard_s = -1e9
            self.engine.dispose()
            if batch.in_doubt:
                return False
            if not batch.in_sql:
                self._undo(batch)
            batch.waiting = []
        self._waiting = batch.waiting
        self._tell(batch, failed, True)
        if batch.recalled and failed is None:
            self._ring(batch.recalled)
        return failed is None

    def _undo(self, batch: Batch) -> None:
        """It is not in: corrections are not lost, all else is as if it had not been asked."""
        batch.filled = {}
        for order in reversed(batch.orders):
            if isinstance(order, Move):
                self.queue.appendleft(order)
            elif isinstance(order, Take):
                order.fate = None

    def _transact(self, batch: Batch) -> None:
        orders = [order for order in batch.orders if not (isinstance(order, Look | Take) and order.cancelled)]
        looks = [order for order in orders if isinstance(order, Look)]
        while True:
            changing = self._doubt is not None or len(looks) < len(orders)
            if changing and self._only_waiting(orders) and self._doubt is None:
                changing = False
            late: dict[Key, int] = {}
            if not changing:
                batch.read_at_s = time.monotonic()
                with self._reading() as connection:
                    batch.rows = budget_rows.read(connection, batch.scopes, lock=False)
                self.heard_s = batch.read_at_s
                late = late_of(batch.rows, orders)
                takes = [order for order in orders if isinstance(order, Take)]
                changing = not late and (any(gives(batch.rows, look) for look in looks) or self._ripe(batch, takes))
                if not changing:
                    batch.waiting = takes
            if changing:
                with self.lock:
                    try:
                        late = self._change(batch, orders)
                    except Exception:
                        if self._doubt is batch:  # told before another thread can find out what came of it
                            batch.waiting, batch.in_doubt = [], True
                            self._tell(batch, away(), False)
                        raise
            if not late:
                return
            with self.engine.begin() as connection:
                budget_rows.start(connection, late)

    def _only_waiting(self, orders: Sequence[Order]) -> bool:
        return all(
            isinstance(order, Look) or (isinstance(order, Take) and order.recall_until_s is not None)
            for order in orders
        )

    def _ripe(self, batch: Batch, waiting: list[Take]) -> bool:
        """Whether one of those who wait for a recall would now be decided."""
        now_s = time.monotonic()
        for take in waiting:
            short = short_of(batch.rows, take)
            waits = short and all(key in take.recalled and batch.rows[key].spare_nanousd for key in short)
            if not waits or now_s >= (take.recall_until_s or 0):
                return True
        return False

    def _change(self, batch: Batch, orders: Sequence[Order]) -> dict[Key, int]:
        """One transaction; where a budget has to be started first it does nothing, and returns which."""
        with self.engine.connect() as connection, connection.begin() as transaction:
            batch.read_at_s = time.monotonic()
            held = {scope for order in orders if not isinstance(order, Look) for scope, _ in keys_of(order)}
            rows, holds = budget_rows.lock(connection, batch.scopes | self.doubtful_scopes(), self.life, held)
            self.resolve_doubt(connection)
            late = late_of(rows, orders)
            if late:
                return late
            changed = Changes(rows, holds, self.life, batch.number)
            batch.waiting, batch.filled, batch.recalled = [], {}, set()
            for order in sorted(orders, key=moves_first):
                if isinstance(order, Look):
                    changed.give(order)
                elif isinstance(order, Move):
                    changed.move(order)
                elif isinstance(order, Take):
                    self._take(changed, batch, order)
            for key in batch.recalled:
                changed.recall(key)
            self._fill(changed, batch, orders)
            self._doubt = batch if changed.holds else None
            with budget_rows.last_words(connection, changed.rows, changed.holds):
                transaction.commit()
            self._doubt, batch.in_sql, batch.rows = None, True, rows
            for take in batch.waiting:
                take.own, take.fate = {}, None
            self.note(rows, holds, {one for order in orders for one in slices_of(order)})
        return {}

    def _take(self, changed: Changes, batch: Batch, take: Take) -> None:
        short = short_of(changed.budgets, take)
        if not short:
            changed.take(take)
            return
        changed.put_back(take)
        now_s = time.monotonic()
        slices = {one.key: one for one in take.account.slices}
        for key in short:
            spare = changed.budgets[key].spare_nanousd
            if not spare or spare == slices[key].given_up:
                take.short = key
                return
        if take.recall_until_s is None:
            take.recall_until_s = now_s + RECALL_S
        if now_s < take.recall_until_s:
            batch.recalled.update(key for key in short if key not in take.recalled)
            take.recalled.update(short)
            batch.waiting.append(take)
            return
        for key in short:
            slices[key].given_up = changed.budgets[key].spare_nanousd
        take.short = short[0]

    def _fill(self, changed: Changes, batch: Batch, orders: Sequence[Order]) -> None:
        """What the worker may keep unused of the budgets that it has asked more of."""
        now_s = time.monotonic()
        unused = {order.slice: order.slice.free for order in orders if isinstance(order, Fill)}
        for order in orders:
            if isinstance(order, Take):
                unused |= {one: one.free for one in order.account.slices if one.divisible}
        for one, free in unused.items():
            row, limit = changed.budgets[one.key], one.limit_nanousd
            recalled = now_s < one.exact_until_s or one.recalls < row.recalls
            size = 0 if recalled else one.fits(row, limit, self.workers)
            added = max(0, size - max(0, free))
            batch.filled[one.key] = (added, size, limit)
            if size:
                changed.fill(one.key, added, free + added)

    def _ring(self, keys: set[Key]) -> None:
        """Where this fails the others hear of it when they next touch the budget."""
        with contextlib.suppress(SQLAlchemyError):
            with self.engine.connect() as connection:
                workers = budget_rows.keepers(connection, keys)
            for worker in workers:
                if worker != self.life:
                    with self.engine.begin() as connection:
                        budget_rows.ring(connection, worker)

    def _reading(self) -> Connection:
        return self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _poll(self) -> None:
        """Whether somebody wants back what this worker does not use."""
        now_s = time.monotonic()
        self._next_poll_s = now_s + POLL_S
        try:
            with self._reading() as connection:
                rung = budget_rows.rung(connection, self.life)
            if rung != self._rung:
                with self.lock:  # the ledger's thread changes what is kept
                    scopes = {scope for scope, _ in self._keeping}
                with self._reading() as connection:
                    rows = budget_rows.read(connection, scopes, lock=False)
                with self.lock:
                    self.note(rows, {}, list(self._keeping.values()))
                self._rung = rung
                self._tell(Batch(0, [], rows, now_s), None, True)
            self.heard_s = now_s
        except SQLAlchemyError as error:
            self.heard_s = -1e9
            self._next_poll_s = time.monotonic() + self.beat_s
            log.error("budgets.poll_failed", error=str(error).partition("\n")[0][:200])
            self.engine.dispose()

    def forget(self, life: str) -> int:
        """What a process held that is gone."""
        with self.engine.begin() as connection:
            return budget_rows.forget(connection, life)

    def _beat(self) -> None:
        """Say that this worker lives, and count as spent what dead ones hold.

        Nobody is called dead by one who was cut off itself: then nobody was heard of.
        """
        now_s = time.monotonic()
        self._next_beat_s = now_s + self.beat_s
        try:
            with self.lock, self.engine.begin() as connection:
                known = budget_rows.beat(connection, self.life, socket.gethostname(), os.getpid())
                self.workers = budget_rows.living(connection)
                if self._doubt is None:
                    budget_rows.drop_empty_holds(connection, self.life)
            self.beaten_s = self.heard_s = now_s
            self._tell_beat(known)
            while now_s - self._steady_since_s >= self._dead_after_s:
                with self.engine.begin() as connection:
                    found = budget_rows.reclaim(connection, self._dead_after_s)
                if found is None:
                    break
                log.warning("budgets.reclaimed", worker=found[0], held_nanousd=found[1])
        except Exception as error:
            self._steady_since_s = now_s
            self.heard_s = -1e9
            log.error("budgets.heartbeat_failed", error=str(error).partition("\n")[0][:200])


def away() -> Unavailable:
    """Says nothing of the database's address: that is for the log."""
    return Unavailable(
        "The database that holds the budgets cannot be asked; no call that costs money is admitted without it. "
        "Retry shortly.",
        retry_after_s=1,
    )
