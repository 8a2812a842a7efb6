"""Who may use a PostgreSQL database at the same time: gateways that share their limits, or one that does not.

A gateway without Redis counts rates and budgets in its own memory, as if it were alone; two of them on one database
would each grant the whole limit. A session-level advisory lock says which kind is running: the lone one takes it
whole, those in shared mode share it. It ends with the connection, so a crash leaves nothing behind. It takes a
connection of its own, and a pooler in between must not share sessions among clients.

A server that restarts forgets its locks: whoever runs looks every `LOOK_S` whether its connection stands, and takes the
lock again. Who finds it taken by then admits nothing more.
"""

import asyncio
import contextlib

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from gateway.telemetry.logs import get_logger

LOOK_S = 2.0
log = get_logger(__name__)

_LOCK = int.from_bytes(b"ll_claim")
"""Advisory locks are per database."""


class DatabaseClaimed(RuntimeError):
    """Another gateway uses this database in a way that excludes this one; the message says what to do."""


class DatabaseClaim:
    """One process's claim. `take` and `close` block; `keep` looks after it."""

    def __init__(self, engine: Engine, *, shared: bool) -> None:
        self._engine = engine
        self._shared = shared
        self._connection: Connection | None = None
        self.lost = ""
        """Why nothing may be admitted; empty: the claim stands, as far as is known."""

    def take(self) -> None:
        """Nothing to do on SQLite, whose gateways are told apart by their state folder. Raises DatabaseClaimed."""
        if self._engine.dialect.name != "postgresql":
            return
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        function = "pg_try_advisory_lock_shared" if self._shared else "pg_try_advisory_lock"
        try:
            taken = connection.scalar(text(f"SELECT {function}(:lock)"), {"lock": _LOCK})
        except BaseException:
            connection.close()
            raise
        if not taken:
            connection.close()
            raise DatabaseClaimed(_ALONE if self._shared else _ANOTHER)
        self._connection = connection

    async def keep(self) -> None:
        """For ever: look whether the claim stands, and take it again where it fell with its connection."""
        while self._engine.dialect.name == "postgresql":
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        try:
            if self._connection is not None:
                self._connection.scalar(text("SELECT 1"))
                return
            self.take()
        except SQLAlchemyError as error:  # the server is away; without it nobody else takes the claim either
            log.warning("database.claim_connection_lost", error=str(error)[:200])
            self.close()
        except DatabaseClaimed as error:
            if not self.lost:
                log.error("database.claimed_by_another", error=str(error))
            self.lost = str(error)
        else:
            self.lost = ""
            log.info("database.claimed_again")

    def close(self) -> None:
        """Give the claim back; its connection does not go back to the pool, as it may be broken."""
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._connection.scalar(text("SELECT pg_advisory_unlock_all()"))
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


_ALONE = (
    "DATABASE_URL: a gateway without REDIS_URL is running on this database and counts its limits alone; stop it, or "
    "start it with the same REDIS_URL as this one"
)
_ANOTHER = (
    "DATABASE_URL: another gateway is running on this database, and without REDIS_URL each would grant the whole of "
    "every limit; set the same REDIS_URL (redis://HOST:PORT/DB) for all of them, or give this one a database of its own"
)
