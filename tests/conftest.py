"""Real servers for the tests: a throw-away Redis and PostgreSQL, a fake upstream with its own oracle, real gateways.

Nothing here is patched and nothing leaves the machine. Each server takes a free port and is stopped by its fixture.
"""

import contextlib
import itertools
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("leadline", deadline=None)  # how long an example takes says more of the machine
settings.load_profile("leadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=0.0, metavar="MINUTES",
        help="long sizes, whole at 30 and in proportion to it, and no time limits (`make soak`)",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0), append=False)


Size = Callable[[int, int], int]


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    """Of (the usual, the long) the one this run was asked for: never less than the usual."""
    share = request.config.getoption("--soak") / 30
    return lambda usual, long: max(usual, round(long * share))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


_LOWEST_PORT, _PORTS = 10_000, 22_000  # below those that a kernel gives to connections and to who asks for any
_next_port = itertools.count(random.SystemRandom().randrange(_PORTS))  # another process of tests begins elsewhere


def free_port() -> int:
    """For a server that comes in some seconds: nobody is given it by chance in between."""
    while True:
        port = _LOWEST_PORT + next(_next_port) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], timeout_s: float = 100) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it listened")
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


def start_redis(folder: Path, port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    wait_for_port(port, process)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)  # in order, on a busy machine
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on PATH; `make test` installs it where apt is")
    port = free_port()
    process = start_redis(tmp_path_factory.mktemp("redis"), port)
    yield f"redis://127.0.0.1:{port}/0"
    stop(process)


def _postgres_bin() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL cluster of our own; as an unprivileged user when we are root, as initdb demands."""
    bin_ = _postgres_bin()
    if bin_ is None:
        pytest.skip("PostgreSQL is not installed; `make test` installs it where apt is")
    user = None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="leadline-pg-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        subprocess.run(
            [bin_ / "initdb", "-D", data, "-U", "leadline", "-A", "trust", "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder,
        )  # fmt: skip
        server = subprocess.Popen(
            [bin_ / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"],
            stderr=subprocess.DEVNULL, user=user, cwd=folder,
        )  # fmt: skip
        wait_for_port(port, server)
        _wait_until_started(f"postgresql://leadline@127.0.0.1:{port}/postgres")
        yield f"postgresql://leadline@127.0.0.1:{port}"
        stop(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_started(url: str, timeout_s: float = 100) -> None:
    """It listens before it takes connections."""
    import psycopg

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """An empty database in that cluster."""
    import psycopg

    name = f"test_{time.time_ns()}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield f"{postgres_server}/{name}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same test on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
