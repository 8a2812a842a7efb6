"""Who may use a PostgreSQL database at the same time: gateways that share their limits, or one that does not.

A gateway without Redis counts rates and budgets in its own memory, as if it were alone; two of them on one database
would each grant the whole limit. A session-level advisory lock says which kind is running: the lone one takes it
whole, those in shared mode share it. It ends with the connection, so a crash leaves nothing behind. It takes a
connection of its own, and a pooler in between must not share sessions among clients.
"""

from sqlalchemy import Connection, Engine, text

_LOCK = int.from_bytes(b"ll_claim")
"""Advisory locks are per database."""


class DatabaseClaimed(RuntimeError):
    """Another gateway uses this database in a way that excludes this one; the message says what to do."""


def claim(engine: Engine, *, shared: bool) -> Connection | None:
    """Close the connection to give the claim back; None on SQLite, whose gateways are told apart by their state folder.

    Raises DatabaseClaimed.
    """
    if engine.dialect.name != "postgresql":
        return None
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    function = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
    if connection.scalar(text(f"SELECT {function}(:lock)"), {"lock": _LOCK}):
        return connection
    connection.close()
    if shared:
        raise DatabaseClaimed(
            "DATABASE_URL: a gateway without REDIS_URL is running on this database and counts its limits alone; stop "
            "it, or start it with the same REDIS_URL as this one"
        )
    raise DatabaseClaimed(
        "DATABASE_URL: another gateway is running on this database, and without REDIS_URL each would grant the whole "
        "of every limit; set the same REDIS_URL (redis://HOST:PORT/DB) for all of them, or give this one a database "
        "of its own"
    )
