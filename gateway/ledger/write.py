"""Rows into SQL by the driver's own bulk calls: what the writer thread spends here, the event loop cannot have.

Measured per request (one row, one attempt): SQLite 8.1 µs with `VALUES` of many rows, against 12.0 for `executemany`
over tuples and about 20 by way of SQLAlchemy Core; PostgreSQL 3.7 µs with one JSON document per table, against 34.8
(`executemany`: 22.5).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InterfaceError, OperationalError

from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.tables import AttemptRow, RequestRow

Rows = Sequence[tuple[RequestRecord, list[AttemptRecord]]]
Record = RequestRecord | AttemptRecord

REQUEST, ATTEMPT = str(RequestRow.__tablename__), str(AttemptRow.__tablename__)
_REQUEST_LENGTHS, _ATTEMPT_LENGTHS = (
    {name: length for name, length in ((c.name, getattr(c.type, "length", None)) for c in columns) if length}
    for columns in (RequestRow.__table__.columns, AttemptRow.__table__.columns)  # type: ignore[attr-defined]
)
_encode = msgspec.json.Encoder().encode
_as_tuple, _as_dict = msgspec.structs.astuple, msgspec.structs.asdict


class Booking(Protocol):
    """Books what is inserted in budgets that workers share, in the same transaction."""

    @property
    def life(self) -> str:
        """Names what this process holds of them; its journal carries the name."""
        ...

    def insert(self, engine: Engine, records: Sequence[RequestRecord], write: Callable[[Connection], set[str]]) -> None:
        """Run `write`, which inserts `records` and returns the ids that are new, and book those. Commits."""
        ...

    def abandon(self, record: RequestRecord) -> None:
        """The database refuses this row for what it is."""
        ...

    async def stop(self) -> bool:
        """Nothing more is inserted. Whether this process holds nothing any more: else its journal keeps its name."""
        ...

    def forget(self, lives: Sequence[str]) -> None:
        """The journals of these are in the ledger: what they held is given back."""
        ...


class Writer(ABC):
    """Inserts rows in one transaction and leaves alone those whose id is there: so a replay changes nothing."""

    def __init__(self, engine: Engine) -> None:
        driver: Any = engine.dialect.loaded_dbapi
        self.engine = engine
        self.away: tuple[type[Exception], ...] = (
            driver.OperationalError, driver.InterfaceError, OperationalError, InterfaceError,
        )  # fmt: skip
        """Raised when the database cannot be reached or cannot write now: the same rows may go in later."""
        self.refused: type[Exception] = driver.Error
        """Raised for what a row holds."""

    def insert(self, rows: Rows, booking: Booking | None = None, *, fitted: bool = False) -> None:
        """`fitted`: with texts cut to their columns, for a row that was refused as it is."""
        requests = [request for request, _ in rows]
        attempts = [attempt for _, tried in rows for attempt in tried]
        if fitted or _holds_nul(requests, attempts):
            requests = [_fitted(request, _REQUEST_LENGTHS) for request in requests]
            attempts = [_fitted(attempt, _ATTEMPT_LENGTHS) for attempt in attempts]
        if booking is not None:
            booking.insert(self.engine, requests, lambda connection: self._insert_new(connection, requests, attempts))
            return
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            self.execute(cursor, requests, attempts)
            connection.commit()
        except self.away:
            connection.invalidate()
            raise
        finally:
            connection.close()  # back to the pool, which rolls back what was not committed

    def _insert_new(
        self, connection: Connection, requests: list[RequestRecord], attempts: list[AttemptRecord]
    ) -> set[str]:
        cursor = connection.connection.cursor()
        return self.execute_new(cursor, requests, attempts)

    @abstractmethod
    def execute_new(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> set[str]:
        """As `execute`; returns the ids of the requests that were not there."""
        ...

    @abstractmethod
    def execute(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> None: ...


class _SQLite(Writer):
    """The driver lets go of the GIL for every statement and then waits for it, so rows go in by the hundred.

    It also looks for an adapter of every None and bool it is given: without one, that search takes longer than the
    insertion of the value.
    """

    ROWS = 128
    """In one statement."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        driver: Any = engine.dialect.loaded_dbapi
        driver.register_adapter(type(None), {}.get)
        driver.register_adapter(bool, int)
        self._requests, self._attempts = (_insert(table, record, 1) for table, record in _TABLES)
        self._many_requests, self._many_attempts = (_insert(table, record, self.ROWS) for table, record in _TABLES)

    def execute(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> None:
        self._insert(cursor, self._requests, self._many_requests, requests)
        self._insert(cursor, self._attempts, self._many_attempts, attempts)

    def _insert(self, cursor: Any, one: str, many: str, records: Sequence[Record]) -> None:
        rest = len(records) % self.ROWS
        for at in range(0, len(records) - rest, self.ROWS):
            cursor.execute(many, tuple(chain.from_iterable(map(_as_tuple, records[at : at + self.ROWS]))))
        if rest:
            cursor.executemany(one, map(_as_tuple, records[-rest:]))

    def execute_new(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> set[str]:
        new = set()
        for request in requests:
            cursor.execute(self._requests, _as_tuple(request))
            if cursor.rowcount:
                new.add(request.id)
        self._insert(cursor, self._attempts, self._many_attempts, attempts)
        return new


_TABLES: tuple[tuple[str, type[Record]], ...] = ((REQUEST, RequestRecord), (ATTEMPT, AttemptRecord))


def _insert(table: str, record: type[Record], rows: int) -> str:
    row = f"({', '.join('?' * len(record.__struct_fields__))})"
    return f"INSERT INTO {table} ({_columns(record)}) VALUES {', '.join([row] * rows)} ON CONFLICT (id) DO NOTHING"


class _PostgreSQL(Writer):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._requests, self._attempts = (
            f"INSERT INTO {table} ({_columns(record)}) SELECT {_columns(record)} "
            f"FROM json_populate_recordset(NULL::{table}, %s::json) ON CONFLICT (id) DO NOTHING"
            for table, record in _TABLES
        )

    def execute(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> None:
        cursor.execute(self._requests, (_encode([_as_dict(request) for request in requests]).decode(),))
        cursor.execute(self._attempts, (_encode([_as_dict(attempt) for attempt in attempts]).decode(),))

    def execute_new(self, cursor: Any, requests: list[RequestRecord], attempts: list[AttemptRecord]) -> set[str]:
        document = _encode([_as_dict(request) for request in requests]).decode()
        new = {found[0] for found in cursor.execute(f"{self._requests} RETURNING id", (document,))}
        cursor.execute(self._attempts, (_encode([_as_dict(attempt) for attempt in attempts]).decode(),))
        return new


def writer_for(engine: Engine) -> Writer:
    return _PostgreSQL(engine) if engine.dialect.name == "postgresql" else _SQLite(engine)


def _columns(record: type[Record]) -> str:
    return ", ".join(record.__struct_fields__)


def _holds_nul(requests: list[RequestRecord], attempts: list[AttemptRecord]) -> bool:
    """PostgreSQL has no NUL in text, and the words of a caller or an upstream may hold one."""
    return any(
        "\x00" in f"{r.model_requested}{r.session}{r.scope}{r.error_code}{r.idempotency_key}" for r in requests
    ) or any(a.error is not None and "\x00" in a.error for a in attempts)


def _fitted(record: Any, lengths: dict[str, int]) -> Any:
    """The record with its texts as any column takes them: without NUL, and no longer than the column."""
    texts = {name: value for name, value in _as_dict(record).items() if isinstance(value, str)}
    return msgspec.structs.replace(
        record,
        **{
            name: value.replace("\x00", "\N{REPLACEMENT CHARACTER}")[: lengths.get(name)]
            for name, value in texts.items()
        },
    )
