"""A Redis and a PostgreSQL of a benchmark's own, thrown away after it."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Its URL."""
    with tempfile.TemporaryDirectory(prefix="leadline-redis-") as folder:
        port = free_port()
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with _running(command):
            _answers(port)
            yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Its URL, without a database's name; as an unprivileged user when we are root, as initdb demands."""
    import psycopg

    user = None
    if os.geteuid() == 0:
        user = "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="leadline-pg-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        bin_, data, port = _postgres_bin(), folder / "data", free_port()
        subprocess.run(
            [bin_ / "initdb", "-D", data, "-U", "leadline", "-A", "trust", "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder,
        )  # fmt: skip
        command = [str(bin_ / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
        with _running(command, user=user, cwd=folder):
            _answers(port)
            url = f"postgresql://leadline@127.0.0.1:{port}"
            deadline = time.monotonic() + START_S
            while True:  # it listens before it takes connections
                try:
                    psycopg.connect(f"{url}/postgres").close()
                    break
                except psycopg.OperationalError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def database(server: str) -> Iterator[str]:
    """The URL of an empty database, dropped afterwards."""
    import psycopg

    name = f"bench_{time.time_ns()}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield f"{server}/{name}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _postgres_bin() -> Path:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not versions:
        raise FileNotFoundError("PostgreSQL's initdb is not installed; `sh scripts/ensure_services.sh` installs it")
    return versions[-1].parent


@contextlib.contextmanager
def _running(command: list[str], **options: object) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL waits for nobody then
        process.wait(30)


def _answers(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.02)
