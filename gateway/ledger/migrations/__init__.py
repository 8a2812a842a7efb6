"""The ledger's schema in numbered steps, and the one way a database gets to the newest of them: `upgrade`.

How to add a step (say 0003):
1. Change `gateway/ledger/tables.py`. New columns come last in their table; a column that may not be NULL needs a
   `server_default`, which the rows that are already there get.
2. Write `versions/0003_what_it_adds.py` with `revision = "0003"`, `down_revision = "0002"` and an `upgrade()` of
   Alembic operations (`op.add_column`, `op.create_table`, `op.create_index`). The number is the file's first four
   characters, numbers have no gaps, and the highest is the head: nothing else names it. When two branches take the
   same number, the one that lands second renames its file and its two revisions.
3. Never import `gateway.ledger.tables` there: a step says what it did on its day, however the tables change later.
4. `python -m pytest tests/ledger/test_migrations.py` checks that steps and tables say the same, on both databases.
5. At a release, freeze its schema: `tests/ledger/released/NNNN.DIALECT.sql`, with rows in it.

There is no downgrade: an older gateway refuses a newer database, and a backup is what brings an old one back.

A whole upgrade is one transaction under one lock (SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock), so that
workers may start together and a kill in the middle leaves what was there before. At head it is one SELECT, and Alembic
(0.2 s) is not imported; an empty database is made from the tables' own definition, which the tests hold equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    event,
    inspect,
    text,
)
from sqlmodel import SQLModel

import gateway.ledger.tables  # noqa: F401  # registers the tables with SQLModel.metadata

FOLDER = Path(__file__).parent
LOCK = 0x6C6561646C696E65
"""PostgreSQL's advisory lock of an upgrade: `leadline` in ASCII."""
LOCK_WAIT_S = 60
"""For another worker's upgrade, or for a table that somebody holds; a start that waits longer fails and says so."""

_version_table = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))


class SchemaTooNew(RuntimeError):
    """The database was made by a later version of Leadline."""


@cache
def head() -> str:
    """The newest step that this code knows."""
    return max(path.name[:4] for path in (FOLDER / "versions").glob("[0-9]*.py"))


def upgrade(engine: Engine) -> None:
    """Bring the database to `head`, whatever it is now. Raises SchemaTooNew, and SQLAlchemy's errors."""
    with engine.connect() as connection:
        if _at_head(connection):
            return
    with _exclusive(engine) as connection:
        if _at_head(connection):
            return
        if inspect(connection).has_table("request") or inspect(connection).has_table("api_key"):
            _run_steps(connection)
        else:
            SQLModel.metadata.create_all(connection)
            _version_table.create(connection, checkfirst=True)
            connection.execute(_version_table.insert().values(version_num=head()))


def version(connection: Connection) -> str | None:
    """The step that the database is at; None for one that no migration has touched."""
    if not inspect(connection).has_table(_version_table.name):
        return None
    found: str | None = connection.execute(_version_table.select()).scalar()
    return found


def _at_head(connection: Connection) -> bool:
    found = version(connection)
    if found is not None and found > head():
        raise SchemaTooNew(
            f"its schema is version {found}, and this Leadline knows versions up to {head()}; "
            "upgrade Leadline, or give it another database"
        )
    return found == head()


@contextmanager
def _exclusive(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other upgrade can run beside, and that holds every change of the schema or none."""
    if engine.dialect.name == "sqlite":
        alone = create_engine(engine.url, poolclass=NullPool, connect_args={"timeout": LOCK_WAIT_S})
        event.listen(alone, "connect", _leave_transactions_to_us)
        event.listen(alone, "begin", _begin_immediate)
        with alone.begin() as connection:
            yield connection
    else:
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            yield connection


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else sqlite3 commits before each CREATE and ALTER


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _run_steps(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
