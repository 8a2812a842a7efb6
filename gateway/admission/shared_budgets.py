"""Hard budgets of many workers: reserved in the shared SQL database, settled in the ledger's own transaction.

A worker reserves in memory out of a slice of each budget, which SQL counts as reserved, as long as much is left of it;
near its end every call reserves in SQL (`gateway.admission.slices`). One thread per worker takes the orders about what
SQL holds to it (`gateway.admission.budget_writer`). What a request has spent is booked, and what it still holds is
given back, by the transaction that inserts its row (`SharedBudgets.insert`): counters equal the ledger at every commit,
and nothing that dies in between can lose either.

A worker that dies leaves its holds behind, its slices with them: others count them as spent once it has not been heard
of for DEAD_AFTER_S, and whoever brings its journal into the ledger gives them back (`forget`).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from gateway.admission.budget_batch import Batch, slices_of
from gateway.admission.budget_writer import WAIT_S, BudgetWriter, away
from gateway.admission.budgets import Account, Budget, LocalAccount, exceeded
from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_account import Fill, Look, Move, SharedAccount, Take
from gateway.admission.slices import Slice
from gateway.errors import Unavailable
from gateway.ledger import budget_rows
from gateway.ledger.budget_rows import Key, Row
from gateway.ledger.records import RequestRecord
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

DEAD_AFTER_S = 30.0
FRESH_S = 0.5
"""How old what is known of a budget may be where a request need not ask for it."""
TRUST_S = 2.0
"""A worker that has not heard of the database for so long reserves nothing in memory."""
IDLE_S = 2.0
"""A slice that nobody uses goes back after this."""
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


class SharedBudgets:
    """The budgets of one of many workers."""

    def __init__(self, engine: Engine, *, dead_after_s: float = DEAD_AFTER_S, fresh_s: float = FRESH_S) -> None:
        self._writer = BudgetWriter(engine, dead_after_s=dead_after_s, tell=self._tell, tell_beat=self._tell_beat)
        self._engine = engine
        self._fresh_s = fresh_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slices: WeakValueDictionary[Key, Slice] = WeakValueDictionary()
        self._warm: dict[Key, Slice] = {}
        """Those that hold something, or have lately been used."""
        self._open: dict[str, SharedAccount] = {}
        """Requests that hold something and whose rows are not in the ledger."""
        self._uneven: set[Slice] = set()
        """Those to be levelled at the end of this turn of the event loop."""

    @property
    def life(self) -> str:
        return self._writer.life

    # for the requests -----------------------------------------------------------------------------------------------

    async def find(self, limits: Sequence[BudgetLimit], now_ms: int, request_id: str) -> Account:
        """The account of one request, its budgets as SQL had them FRESH_S ago at most. Raises Unavailable."""
        if not limits:
            return _NO_BUDGETS
        account = SharedAccount(self, request_id, limits, now_ms)
        if not self._known(account):
            await self._ask(Look(account, asyncio.get_running_loop().create_future()))
        else:
            self._bind(account, None, 0.0)
        return account

    def all(self) -> list[Budget]:
        """The budgets of the requests under way, as last seen."""
        return [one.budget for one in self._warm.values()]

    async def take(self, account: SharedAccount, amount_nanousd: int) -> None:
        """Hold `amount_nanousd` more of all budgets of the account. Raises BudgetExceeded and Unavailable."""
        slices, now_s = account.slices, time.monotonic()
        trusted = self._trusted(now_s)
        for one in slices:
            one.used_s = now_s
            one.largest = max(one.largest, amount_nanousd)
            trusted = trusted and one.free >= amount_nanousd
        if trusted:
            for one in slices:
                one.take(amount_nanousd)
                if one.free < one.size // 2 and not one.asked and one.keeps:
                    self._put(Fill(one))
            self._open[account.request_id] = account
            return
        own = {one.key: min(one.free, amount_nanousd) for one in slices if one.free > 0}
        for one in slices:
            one.free -= own.get(one.key, 0)
        take = Take(account, amount_nanousd, asyncio.get_running_loop().create_future(), own)
        short = await self._ask(take)
        if short is not None:
            raise exceeded(next(one.budget for one in slices if one.key == short), amount_nanousd)
        self._open[account.request_id] = account

    def give_back(self, slices: Sequence[Slice], amount_nanousd: int) -> None:
        """Of what a request holds, `amount_nanousd` is not needed; negative: more was."""
        for one in slices:
            one.give_back(amount_nanousd)
            if not one.keeps or one.free < 0:
                self._level_soon(one)

    async def _ask(self, order: Look | Take) -> Key | None:
        """The budget that is short, for a Take."""
        if isinstance(order, Take):
            self._put(order)
        else:
            self._writer.put(order)
        try:
            async with asyncio.timeout(WAIT_S):
                return await order.done
        except BaseException as error:
            order.cancelled = True
            if isinstance(order, Take) and order.delivered:  # in the very turn in which its caller left
                self.give_back(order.account.slices, order.amount)
            if isinstance(error, TimeoutError):
                raise away() from error
            raise

    def _known(self, account: SharedAccount) -> bool:
        """Whether what this worker knows of the account's budgets will do."""
        now_s = time.monotonic()
        if not self._trusted(now_s):
            return False
        for key in account.limits:
            one = self._slices.get(key)
            if one is None or not one.divisible or now_s - one.seen_s > self._fresh_s:
                return False
            if one.budget.started_ms < account.starts[key]:
                return False
        return True

    def _trusted(self, now_s: float) -> bool:
        """Whether what this worker holds is certainly its own: others wait far longer before they count it as spent."""
        writer = self._writer
        return now_s - writer.heard_s <= TRUST_S and now_s - writer.beaten_s <= 3 * writer.beat_s

    # for the ledger -------------------------------------------------------------------------------------------------

    def insert(self, engine: Engine, records: Sequence[RequestRecord], write: Callable[[Connection], set[str]]) -> None:
        """Insert closed requests and book them, in one transaction. Called by the ledger's thread.

        `write` inserts the rows and returns the ids that were not there before: those, and only those, are booked, so
        that a replay changes nothing.
        """
        writer = self._writer
        with contextlib.ExitStack() as stack:
            if engine.dialect.name == "sqlite":  # one writer at a time: whoever waits for the lock must not be it
                stack.enter_context(writer.lock)
            connection = stack.enter_context(engine.connect())
            transaction = stack.enter_context(connection.begin())
            budget_rows.enter_ledger(connection)
            new = write(connection)
            stack.enter_context(writer.lock)
            inserted = [record for record in records if record.id in new]
            accounts = [self._open[record.id] for record in records if record.id in self._open]
            slices = {one.key: one for account in accounts for one in account.slices}
            scopes = {scope for record in inserted for scope in budget_rows.scopes_of(record)}
            held = {scope for scope, _ in slices}
            read_at_s = time.monotonic()
            rows, holds = budget_rows.lock(connection, scopes | held | writer.doubtful_scopes(), self.life, held)
            writer.resolve_doubt(connection)
            budget_rows.book(rows, inserted)
            for account in accounts:
                if account.request_id in new:
                    for one in account.slices:
                        budget_rows.release(rows[one.key], holds[one.key], account.in_use)
            for key, hold in holds.items():
                if hold.spare_nanousd and key in slices:
                    budget_rows.set_spare(rows[key], hold, max(1, slices[key].free))
            with budget_rows.last_words(connection, list(rows.values()), list(holds.values())):
                transaction.commit()
            writer.note(rows, holds, slices.values())
            for account in accounts:  # one that was not new was booked by a commit that went unanswered
                del self._open[account.request_id]
            if accounts:
                self._call(self._booked, accounts, rows, read_at_s)

    def abandon(self, record: RequestRecord) -> None:
        """A row that the database refused for what it is: nothing is booked, what it holds is given back."""
        account = self._open.pop(record.id, None)
        if account is not None:
            self._call(account.abandon)

    def forget(self, lives: Sequence[str]) -> None:
        """Give back what processes held that are gone: their journals are in the ledger."""
        for life in lives:
            log.warning("budgets.recovered", worker=life, held_nanousd=self._writer.forget(life))

    # the worker's life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer.start()

    async def stop(self) -> bool:
        """After the ledger's last insertion: what waits is done once more, then nothing is held.

        A worker that ends in order leaves nothing to reclaim. False: it holds what the ledger still lacks, or the
        database did not take it back.
        """
        ended = False
        self._level_all()
        await asyncio.to_thread(self._writer.stop)
        if not self._open:
            with contextlib.suppress(SQLAlchemyError):
                await asyncio.to_thread(self._writer.forget, self.life)
                ended = True
        self._engine.dispose()
        return ended

    def statistics(self) -> dict[str, int]:
        return {"open": len(self._open), "waiting": len(self._writer.queue)}

    # what the writers tell ------------------------------------------------------------------------------------------

    def _tell(self, batch: Batch, failed: Unavailable | None, certain: bool) -> None:
        self._call(self._answer, batch, failed, certain)

    def _tell_beat(self, known: bool) -> None:
        self._call(self._tidy, known)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _answer(self, batch: Batch, failed: Unavailable | None, certain: bool) -> None:
        """What a batch found and did becomes known to its requests."""
        if certain:
            self._settle(batch)
        for key, row in batch.rows.items():
            one = self._slices.get(key)
            if one is not None:
                self._show(one, row, batch.read_at_s)
        for order in batch.orders:
            if isinstance(order, Move | Fill) or order in batch.waiting or order.done.done():
                continue
            if isinstance(order, Look) and failed is None:
                self._bind(order.account, batch.rows, batch.read_at_s)
            if failed is None:
                order.done.set_result(order.short if isinstance(order, Take) else None)
            else:
                order.done.set_exception(failed)

    def _settle(self, batch: Batch) -> None:
        """What is held by now, and by whom."""
        changed: set[Slice] = set()
        for order in batch.orders:
            if isinstance(order, Look | Move) or order in batch.waiting:
                continue
            slices = slices_of(order)
            changed.update(slices)
            for one in slices:
                one.asked -= 1
            if isinstance(order, Take):
                order.delivered = order.fate == "granted" and not order.done.done()
                for one in slices:
                    if order.delivered:
                        one.budget.reserved_nanousd += order.amount
                        one.use(order.amount)
                    elif order.fate != "short":
                        one.free += order.amount if order.fate == "granted" else order.own.get(one.key, 0)
        for key, (added, size, limit) in batch.filled.items():
            one = self._slices[key]
            one.free += added
            one.size, one.keeps = size, size > 0 and limit <= one.limit_nanousd
        for one in changed:
            self._level(one)

    def _booked(self, accounts: Sequence[SharedAccount], rows: dict[Key, Row], read_at_s: float) -> None:
        """Their rows are in the ledger, and what they held is not held any more."""
        slices: set[Slice] = set()
        for account in accounts:
            slices.update(account.slices)
            for one in account.slices:
                one.in_use -= account.in_use
        for one in slices:
            self._show(one, rows[one.key], read_at_s)

    def _bind(self, account: SharedAccount, rows: dict[Key, Row] | None, read_at_s: float) -> None:
        """To the budgets that bound it: all that there are of its limits, as `rows` has them."""
        found = []
        for key, limit in account.limits.items():
            one = self._slices.get(key)
            if rows is not None:
                row = rows.get(key)
                if row is None:
                    continue
                if one is None:
                    one = self._slices[key] = Slice(key, Budget(row.scope, 0, row.window, 0, 0))
                self._show(one, row, read_at_s)
            assert one is not None
            before = one.limit_nanousd
            if one.follow(limit):
                found.append(one)
                one.used_s = time.monotonic()
                self._warm[key] = one
                if one.limit_nanousd < before and one.keeps:  # it was filled as more was allowed
                    self._be_exact(one)
        account.slices = tuple(found)
        account.budgets = tuple([one.budget for one in found])

    def _show(self, one: Slice, row: Row, read_at_s: float) -> None:
        one.show(row, read_at_s)
        if one.keeps and (time.monotonic() < one.exact_until_s or one.tight(row, self._writer.workers)):
            self._be_exact(one)

    def _tidy(self, known: bool) -> None:
        """After each heartbeat. What is not used goes back; and all of it if others thought this worker dead."""
        now_s = time.monotonic()
        for key, one in list(self._warm.items()):
            one.decay()
            idle = one.in_use == 0 and now_s - one.used_s > IDLE_S
            if one.keeps and (idle or not known):
                self._be_exact(one)
            elif one.keeps and one.free > 2 * one.want:
                self._move(one, one.free - one.want)
            elif idle and not (one.free or one.asked or one.told):
                del self._warm[key]

    # orders to the writer -------------------------------------------------------------------------------------------

    def _be_exact(self, one: Slice) -> None:
        one.keeps = False
        self._level(one)

    def _level_soon(self, one: Slice) -> None:
        """Once for all that happens in this turn of the event loop."""
        if not self._uneven:
            asyncio.get_running_loop().call_soon(self._level_all)
        self._uneven.add(one)

    def _level_all(self) -> None:
        uneven, self._uneven = self._uneven, set()
        for one in uneven:
            self._level(one)

    def _level(self, one: Slice) -> None:
        """Nothing unused stays here that may not; what is used beyond what SQL holds is held there."""
        if one.free < 0 or not one.keeps:
            last = not one.keeps and not one.asked and one.told > 0
            if one.free or last:
                self._move(one, one.free, last=last)

    def _move(self, one: Slice, amount: int, *, last: bool = False) -> None:
        one.free -= amount
        self._writer.put(Move(one, amount, last))

    def _put(self, order: Take | Fill) -> None:
        for one in slices_of(order):
            one.asked += 1
        self._writer.put(order)
