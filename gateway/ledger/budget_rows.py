"""Shared budgets in SQL: what happens to their rows inside a transaction. All blocking; nothing here commits.

Three rules keep the counters equal to the ledger:

1. A budget's `spent_nanousd` is what `report.spent_by` says of its scope since `started_ms`: a request's cost is booked
   in the transaction that inserts its row, only if it was inserted, and by the same criteria.
2. A row is made, or moved to a new window, from the ledger's own sum, under a lock that no insertion holds: a sum sees
   a request's row and its booking, or neither. What is in flight at that time is not held by the new budget.
3. Locks are taken in one order everywhere: the ledger's, then budgets by scope and window, then holds.

Beside the ledger's sum, `spent_nanousd` holds what dead workers may have spent (`worker_hold.reclaimed_nanousd`), until
their journals have said what it was.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    select,
    text,
    update,
)

from gateway.ledger.records import RequestRecord
from gateway.ledger.report import spent_by
from gateway.ledger.tables import BudgetRow, WorkerHoldRow, WorkerRow, insert_into
from routers.units import Window

Key = tuple[str, Window]
"""(scope, window)."""

_LEDGER_LOCK = 0x6275646765740000
"""PostgreSQL's advisory lock: shared by insertions into the ledger, exclusive while a budget starts from its sum.
SQLite has one writer at a time."""
_BUDGET: Any = BudgetRow.__table__  # type: ignore[attr-defined]
_HOLD: Any = WorkerHoldRow.__table__  # type: ignore[attr-defined]
_WORKER: Any = WorkerRow.__table__  # type: ignore[attr-defined]
_BUDGET_CHANGES = ("spent_nanousd", "reserved_nanousd", "given_nanousd", "spare_nanousd", "recalls")
_HOLD_CHANGES = ("amount_nanousd", "reclaimed_nanousd", "reclaimed_in_ms", "batch", "spare_nanousd")
_SELECT_BUDGETS = (
    select(_BUDGET)
    .where(_BUDGET.c.scope.in_(bindparam("scopes", expanding=True)))
    .order_by(_BUDGET.c.scope, _BUDGET.c.window)
)
_LOCK_BUDGETS = _SELECT_BUDGETS.with_for_update()
_UPDATE_BUDGET = (
    update(_BUDGET)
    .where(_BUDGET.c.scope == bindparam("of_scope"), _BUDGET.c.window == bindparam("of_window"))
    .values({name: bindparam(name) for name in _BUDGET_CHANGES})
)
_SELECT_HOLDS = (
    select(_HOLD)
    .where(_HOLD.c.worker == bindparam("of_worker"), _HOLD.c.scope.in_(bindparam("scopes", expanding=True)))
    .order_by(_HOLD.c.scope, _HOLD.c.window)
)
# The same for PostgreSQL, one statement for any number of rows, so that they can go out together without waiting.
_PG_LOCK_BUDGETS = """
SELECT scope, "window", started_ms, spent_nanousd, reserved_nanousd, given_nanousd, spare_nanousd, recalls
FROM budget WHERE scope = ANY(%s) ORDER BY scope, "window" FOR UPDATE
"""
_PG_SELECT_HOLDS = """
SELECT worker, scope, "window", amount_nanousd, reclaimed_nanousd, reclaimed_in_ms, batch, spare_nanousd
FROM worker_hold WHERE worker = %s AND scope = ANY(%s)
"""
_PG_UPDATE_BUDGETS = """
UPDATE budget SET spent_nanousd = now.spent_nanousd, reserved_nanousd = now.reserved_nanousd,
    given_nanousd = now.given_nanousd, spare_nanousd = now.spare_nanousd, recalls = now.recalls
FROM json_populate_recordset(NULL::budget, %s::json) AS now
WHERE budget.scope = now.scope AND budget."window" = now."window"
"""
_PG_WRITE_HOLDS = """
INSERT INTO worker_hold
    (worker, scope, "window", amount_nanousd, reclaimed_nanousd, reclaimed_in_ms, batch, spare_nanousd)
SELECT worker, scope, "window", amount_nanousd, reclaimed_nanousd, reclaimed_in_ms, batch, spare_nanousd
FROM json_populate_recordset(NULL::worker_hold, %s::json)
ON CONFLICT (worker, scope, "window") DO UPDATE SET amount_nanousd = excluded.amount_nanousd,
    reclaimed_nanousd = excluded.reclaimed_nanousd, reclaimed_in_ms = excluded.reclaimed_in_ms,
    batch = excluded.batch, spare_nanousd = excluded.spare_nanousd
"""
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Row:
    """A budget's row as it stands in this transaction."""

    scope: str
    window: Window
    started_ms: int
    spent_nanousd: int
    reserved_nanousd: int
    given_nanousd: int | None
    spare_nanousd: int = 0
    recalls: int = 0


@dataclass(slots=True)
class HoldRow:
    """A worker's part of a budget's reservations."""

    worker: str
    scope: str
    window: Window
    amount_nanousd: int = 0
    reclaimed_nanousd: int = 0
    reclaimed_in_ms: int = 0
    batch: int = 0
    spare_nanousd: int = 0


def scopes_of(record: RequestRecord) -> list[str]:
    """Every scope whose spend a request's row counts in: those that `report.spent_by` finds it by."""
    scopes = [f"key:{record.key_id}", f"tenant:{record.tenant}"]
    if record.team is not None:
        scopes.append(f"team:{record.team}")
    if record.scope is not None:
        end = -1
        while (end := record.scope.find("/", end + 1)) >= 0:
            scopes.append(f"scope:{record.key_id}:{record.scope[:end]}")
        scopes.append(f"scope:{record.key_id}:{record.scope}")
    return scopes


def read(connection: Connection, scopes: Iterable[str], *, lock: bool) -> dict[Key, Row]:
    """The rows of these scopes; with `lock`, nobody else changes them until this transaction ends."""
    wanted = sorted(set(scopes))
    if not wanted:
        return {}
    found = connection.execute(_LOCK_BUDGETS if lock else _SELECT_BUDGETS, {"scopes": wanted})
    return {(row[0], row[1]): Row(*row) for row in found}


def write(connection: Connection, rows: Sequence[Row]) -> None:
    """Rows that `read` has locked, as they are now."""
    if rows:
        connection.execute(
            _UPDATE_BUDGET,
            [
                {
                    "of_scope": row.scope,
                    "of_window": row.window,
                    **{name: getattr(row, name) for name in _BUDGET_CHANGES},
                }
                for row in rows
            ],
        )


def lock(
    connection: Connection, scopes: Iterable[str], worker: str, held: Iterable[str]
) -> tuple[dict[Key, Row], dict[Key, HoldRow]]:
    """The rows of `scopes`, which nobody else changes until this transaction ends, and the worker's holds on `held`.

    In one round trip: others wait for these rows, and each answer of the database has to wait for the event loop's
    thread to let go of the interpreter. `held` are some of `scopes`.
    """
    wanted, holding = sorted(set(scopes)), sorted(set(held))
    if connection.dialect.name != "postgresql":
        rows = read(connection, wanted, lock=True)
        return rows, read_holds(connection, worker, holding) if holding else {}
    if not wanted:
        return {}, {}
    driver: Any = connection.connection.driver_connection
    locked, of_worker = driver.cursor(), driver.cursor()
    with driver.pipeline():
        locked.execute(_PG_LOCK_BUDGETS, (wanted,))
        if holding:
            of_worker.execute(_PG_SELECT_HOLDS, (worker, holding))
    rows = {(row[0], row[1]): Row(*row) for row in locked}
    return rows, {(row[1], row[2]): HoldRow(*row) for row in of_worker} if holding else {}


@contextlib.contextmanager
def last_words(connection: Connection, rows: Sequence[Row], holds: Sequence[HoldRow]) -> Iterator[None]:
    """Write rows and holds that `lock` has returned, as they are now. The body commits: all of it is one round trip."""
    if connection.dialect.name != "postgresql":
        write(connection, rows)
        write_holds(connection, holds)
        yield
        return
    driver: Any = connection.connection.driver_connection
    with driver.pipeline():
        if rows:
            driver.execute(_PG_UPDATE_BUDGETS, (_encode(rows).decode(),))
        if holds:
            driver.execute(_PG_WRITE_HOLDS, (_encode(holds).decode(),))
        yield


def enter_ledger(connection: Connection) -> None:
    """To be called first in a transaction that inserts requests: no budget starts from the ledger's sum meanwhile."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock_shared(:lock)"), {"lock": _LEDGER_LOCK})


def start(connection: Connection, windows: Mapping[Key, int]) -> None:
    """Make each budget's row, or move it to its window (start in milliseconds), from the ledger's sum.

    In a transaction of its own. Whoever comes second finds it done. Reservations stay.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LEDGER_LOCK})
    rows = read(connection, [scope for scope, _ in windows], lock=True)
    for key, started_ms in sorted(windows.items()):
        row = rows.get(key)
        if row is not None and row.started_ms >= started_ms:
            continue
        spent = spent_by(connection, key[0], started_ms)
        values = {"started_ms": started_ms, "spent_nanousd": spent}
        if row is None:
            connection.execute(_BUDGET.insert().values(scope=key[0], window=key[1], reserved_nanousd=0, **values))
        else:
            connection.execute(
                update(_BUDGET).where(_BUDGET.c.scope == key[0], _BUDGET.c.window == key[1]).values(values)
            )


def book(rows: Mapping[Key, Row], records: Iterable[RequestRecord]) -> None:
    """Add the cost of requests whose rows this transaction inserts; `rows` hold the locked budgets of their scopes."""
    by_scope: dict[str, list[Row]] = {}
    for row in rows.values():
        by_scope.setdefault(row.scope, []).append(row)
    for record in records:
        if record.cost_nanousd:
            for scope in scopes_of(record):
                for row in by_scope.get(scope, ()):
                    if record.created_at_ms >= row.started_ms:
                        row.spent_nanousd += record.cost_nanousd


def read_holds(connection: Connection, worker: str, scopes: Iterable[str]) -> dict[Key, HoldRow]:
    """A worker's holds on budgets that this transaction has locked."""
    found = connection.execute(_SELECT_HOLDS, {"of_worker": worker, "scopes": sorted(set(scopes))})
    return {(row[1], row[2]): HoldRow(*row) for row in found}


def release(row: Row, hold: HoldRow, amount_nanousd: int) -> None:
    """Take `amount_nanousd` off a worker's hold: first of what was reclaimed from it while it was thought dead."""
    reclaimed = min(amount_nanousd, hold.reclaimed_nanousd)
    if reclaimed:
        hold.reclaimed_nanousd -= reclaimed
        if hold.reclaimed_in_ms == row.started_ms:
            row.spent_nanousd -= reclaimed
    held = min(amount_nanousd - reclaimed, hold.amount_nanousd)
    hold.amount_nanousd -= held
    row.reserved_nanousd -= held
    set_spare(row, hold, hold.spare_nanousd)


def set_spare(row: Row, hold: HoldRow, spare_nanousd: int) -> None:
    """Say how much of a worker's hold no request uses: never more than it holds."""
    spare = max(0, min(spare_nanousd, hold.amount_nanousd))
    row.spare_nanousd += spare - hold.spare_nanousd
    hold.spare_nanousd = spare


def write_holds(connection: Connection, holds: Sequence[HoldRow]) -> None:
    """Holds as they are now, of budgets that this transaction has locked."""
    if not holds:
        return
    insert = insert_into(_HOLD, connection.dialect.name)
    statement = insert.on_conflict_do_update(
        index_elements=["worker", "scope", "window"], set_={name: insert.excluded[name] for name in _HOLD_CHANGES}
    )
    connection.execute(statement, [asdict(hold) for hold in holds])


def committed(connection: Connection, worker: str, batch: int) -> bool:
    """Whether that batch of the worker's holds is in; its budgets must be locked, so that it cannot come in later."""
    query = select(_HOLD.c.batch).where(_HOLD.c.worker == worker, _HOLD.c.batch >= batch).limit(1)
    return connection.execute(query).first() is not None


def forget(connection: Connection, worker: str) -> int:
    """End a worker: give back all that it held, in amounts held and reclaimed; returns how much that was.

    Its journal must have been replayed: what it spent is in the ledger, and so in the budgets.
    """
    query = select(_HOLD.c.scope).where(_HOLD.c.worker == worker).distinct()
    scopes = list(connection.execute(query).scalars())
    rows = read(connection, scopes, lock=True)
    total = 0
    for key, hold in read_holds(connection, worker, scopes).items():
        amount = hold.amount_nanousd + hold.reclaimed_nanousd
        total += amount
        if (row := rows.get(key)) is not None:
            release(row, hold, amount)
    write(connection, list(rows.values()))
    connection.execute(delete(_HOLD).where(_HOLD.c.worker == worker))
    connection.execute(delete(_WORKER).where(_WORKER.c.id == worker))
    return total


def clear(connection: Connection) -> None:
    """Forget all budgets: a process that books in its own memory is alone on this database, and its rows would be
    missing here. They start from the ledger again when workers next share them."""
    for table in (_BUDGET, _HOLD, _WORKER):
        connection.execute(delete(table))


def drop_empty_holds(connection: Connection, worker: str) -> None:
    """Runs come and go: their holds need not stay."""
    connection.execute(
        delete(_HOLD).where(_HOLD.c.worker == worker, _HOLD.c.amount_nanousd == 0, _HOLD.c.reclaimed_nanousd == 0)
    )


def beat(connection: Connection, worker: str, host: str, pid: int) -> bool:
    """Say that the worker lives, by the database's clock. False: nobody knew; it is new, or was thought dead."""
    now = _now(connection)
    known = connection.execute(update(_WORKER).where(_WORKER.c.id == worker).values(heartbeat_ms=now)).rowcount == 1
    if not known:
        connection.execute(_WORKER.insert().values(id=worker, host=host, pid=pid, heartbeat_ms=now, recalls=0))
    return known


def living(connection: Connection) -> int:
    """How many workers share the budgets."""
    return connection.execute(select(func.count()).select_from(_WORKER)).scalar_one()


def keepers(connection: Connection, keys: Iterable[Key]) -> list[str]:
    """The workers that keep a slice of one of these budgets."""
    found: set[str] = set()
    for scope, window in keys:
        of_row = (_HOLD.c.scope == scope, _HOLD.c.window == window, _HOLD.c.spare_nanousd > 0)
        found.update(connection.execute(select(_HOLD.c.worker).where(*of_row)).scalars())
    return sorted(found)


def ring(connection: Connection, worker: str) -> None:
    """Tell a worker that somebody wants back what it does not use. One worker a transaction: no order of locks."""
    connection.execute(update(_WORKER).where(_WORKER.c.id == worker).values(recalls=_WORKER.c.recalls + 1))


def rung(connection: Connection, worker: str) -> int:
    """How often this worker has been told so."""
    return connection.execute(select(_WORKER.c.recalls).where(_WORKER.c.id == worker)).scalar() or 0


def reclaim(connection: Connection, dead_after_s: float) -> tuple[str, int] | None:
    """Count as spent what one worker holds that has not been heard of for `dead_after_s`; (worker, nano-dollars).

    It may have spent all of it. It is reclaimed once: it is a worker again when it next says that it lives.
    """
    worker = connection.execute(
        select(_WORKER.c.id)
        .where(_WORKER.c.heartbeat_ms < _now(connection) - int(dead_after_s * 1000))
        .order_by(_WORKER.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).scalar()
    if worker is None:
        return None
    query = select(_HOLD.c.scope).where(_HOLD.c.worker == worker, _HOLD.c.amount_nanousd > 0).distinct()
    scopes = list(connection.execute(query).scalars())
    rows = read(connection, scopes, lock=True)
    holds = read_holds(connection, worker, scopes)
    total = 0
    for key, hold in holds.items():
        row, amount = rows[key], hold.amount_nanousd
        row.reserved_nanousd -= amount
        row.spent_nanousd += amount
        if hold.reclaimed_in_ms != row.started_ms:  # what an earlier window counted is gone with it
            hold.reclaimed_nanousd, hold.reclaimed_in_ms = 0, row.started_ms
        hold.reclaimed_nanousd += amount
        hold.amount_nanousd = 0
        set_spare(row, hold, 0)
        total += amount
    write(connection, list(rows.values()))
    write_holds(connection, list(holds.values()))
    connection.execute(delete(_WORKER).where(_WORKER.c.id == worker))
    return worker, total


def integrity(connection: Connection) -> list[str]:
    """What is wrong with the books, in words; empty: all counters equal the ledger and the holds.

    Several statements: while workers write, `connection` must see one snapshot.
    """
    problems = []
    for row in (Row(*found) for found in connection.execute(select(_BUDGET))):
        of_row = (_HOLD.c.scope == row.scope, _HOLD.c.window == row.window)
        sums = connection.execute(
            select(
                _HOLD.c.amount_nanousd,
                case((_HOLD.c.reclaimed_in_ms == row.started_ms, _HOLD.c.reclaimed_nanousd), else_=0),
                _HOLD.c.spare_nanousd,
            ).where(*of_row)
        ).all()
        held, reclaimed, spare = (sum(one[at] for one in sums) for at in range(3))
        spent = spent_by(connection, row.scope, row.started_ms)
        if row.spent_nanousd != spent + reclaimed:
            problems.append(f"{row.scope}/{row.window}: spent {row.spent_nanousd}, ledger {spent} + {reclaimed}")
        if row.reserved_nanousd != held:
            problems.append(f"{row.scope}/{row.window}: reserved {row.reserved_nanousd}, workers hold {held}")
        if row.spare_nanousd != spare or spare > held:
            problems.append(f"{row.scope}/{row.window}: spare {row.spare_nanousd}, workers say {spare} of {held}")
    return problems


def _now(connection: Connection) -> ColumnElement[int]:
    """Milliseconds since the epoch, by the database's clock."""
    if connection.dialect.name == "postgresql":
        return literal_column("(EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::bigint", BigInteger)
    return literal_column("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)", BigInteger)
