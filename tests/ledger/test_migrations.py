"""Every released schema comes to the newest one with its rows, on both databases, whoever starts and whoever dies."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlmodel import Session, SQLModel, select

from gateway.ledger import migrations, report
from gateway.ledger.store import LedgerUnreachable, connect
from gateway.ledger.tables import ApiKey
from gateway.settings import Settings

RELEASED = Path(__file__).parent / "released"
RELEASES = sorted({path.name[:4] for path in RELEASED.glob("*.sql")})
START = "import sys; from gateway.ledger.store import connect; connect(sys.argv[1]).dispose()"


@pytest.fixture
def url(database_url: str) -> str:
    return Settings.from_env({"DATABASE_URL": database_url}).database_url


def restore(url: str, release: str) -> None:
    """The database as that release left it."""
    engine = create_engine(url)
    script = (RELEASED / f"{release}.{engine.dialect.name}.sql").read_text()
    with engine.begin() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        return list(compare_metadata(context, SQLModel.metadata))


def columns(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns in order, with type, nullability and default, as the database itself describes them."""
    inspector = inspect(engine)
    return {
        table: [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in inspector.get_columns(table)]
        for table in sorted(inspector.get_table_names())
    }


def check_rows(engine: Engine) -> None:
    """The rows of the frozen SQL, found again through today's code."""
    with Session(engine) as session:
        keys = {key.id: key for key in session.exec(select(ApiKey))}
    assert {key.name for key in keys.values()} == {"first", "alice"}
    assert keys["77aa00bb11cc"].budget_nanousd == 5_000_000_000
    assert keys["77aa00bb11cc"].team is None
    found = report.request(engine, "req_1")
    assert found is not None
    row, attempts = found
    assert (row["cost_nanousd"], row["scope"], row["team"], row["decision"]) == (
        12345,
        "run42",
        None,
        '{"route":"auto"}',
    )
    assert [(a["id"], a["kind"], a["cost_nanousd"]) for a in attempts] == [("req_1-0", "first", 12345)]
    assert report.summary(engine, since_ms=0)["requests"] == 2
    assert report.summary(engine, since_ms=0)["unpriced"] == 1


def test_the_steps_are_numbered_without_gaps() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    steps = list(ScriptDirectory.from_config(config).walk_revisions())
    assert [step.revision for step in reversed(steps)] == [f"{n:04d}" for n in range(1, len(steps) + 1)]
    assert migrations.head() == steps[0].revision
    assert RELEASES == ["0001"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_released_database_comes_to_head_with_its_rows(url: str, release: str) -> None:
    restore(url, release)
    engine = connect(url)
    assert differences(engine) == []
    check_rows(engine)
    engine.dispose()
    engine = connect(url)  # and stays there
    check_rows(engine)
    engine.dispose()


def test_a_fresh_database_is_what_the_steps_make(url: str, tmp_path: Path) -> None:
    engine = connect(url)
    assert differences(engine) == []
    made = columns(engine)
    with engine.begin() as connection:
        assert migrations.version(connection) == migrations.head()
        SQLModel.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()
    restore(url, "0001")
    engine = connect(url)
    assert columns(engine) == made
    engine.dispose()


def test_tables_left_half_made_by_a_first_start_are_completed(url: str) -> None:
    restore(url, "0001")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE attempt"))
        connection.execute(text("DROP INDEX request_by_key_time"))
    engine.dispose()
    engine = connect(url)
    assert differences(engine) == []
    engine.dispose()


@pytest.mark.parametrize("release", [None, "0001"])
def test_workers_that_start_together_upgrade_once(url: str, release: str | None) -> None:
    if release is not None:
        restore(url, release)

    def start(_: int) -> None:
        connect(url).dispose()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start, range(6)))
    engine = connect(url)
    assert differences(engine) == []
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(migrations.head(),)]
    engine.dispose()


def test_sqlite_takes_many_starts_on_a_new_file(tmp_path: Path) -> None:
    """Two connections that switch a file to WAL at once get SQLITE_BUSY at once, whatever their busy timeout is."""

    def start(url: str) -> None:
        connect(url).dispose()

    with ThreadPoolExecutor(6) as pool:
        for number in range(100):
            list(pool.map(start, [f"sqlite:///{tmp_path / f'{number}.db'}"] * 6))


def test_a_database_of_a_later_version_is_refused(url: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(LedgerUnreachable, match=r"version 9999, and this Leadline knows versions up to \d{4}; upgrade"):
        connect(url)


def test_a_start_at_head_does_not_load_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for _ in range(2):  # a fresh database, then one at head
        loaded = subprocess.run(
            [sys.executable, "-c", START + "; print('alembic' in sys.modules)", url],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert loaded.stdout.strip() == "False"


KILLED = """
import os, sys
from sqlalchemy import Engine, event
from gateway.ledger.store import connect
import alembic.command
url = sys.argv[1]

def start(kill_after):
    # A child of its own, killed by itself after so many statements; True when it came to its end.
    pid = os.fork()
    if pid == 0:
        left = [kill_after]
        @event.listens_for(Engine, "after_cursor_execute")
        def count(*_):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), 9)
        connect(url).dispose()
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0

kills = 1
while not start(kills):
    kills += 1
    print("killed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.timeout(300)
def test_a_kill_after_any_statement_of_an_upgrade_is_made_good_by_the_next_start(url: str) -> None:
    """Killed after its first statement, after its second, …, until it gets through: each time what is left upgrades."""
    restore(url, "0001")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    kills = 0
    with process:
        while process.stdout.readline():
            kills += 1
            engine = create_engine(url)
            with engine.connect() as connection:
                left = migrations.version(connection)
                assert left in (None, migrations.head()), "an upgrade is whole or not there"
                assert connection.execute(text("SELECT count(*) FROM request")).scalar() == 2
            engine.dispose()
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert kills > 10
    engine = connect(url)
    assert differences(engine) == []
    check_rows(engine)
    engine.dispose()
