"""A gateway as its operator runs it: a process of its own."""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import free_port, stop, wait_for_port


class Serving(NamedTuple):
    port: int
    key: str


@contextlib.contextmanager
def serving(policy: str, folder: Path, *, database_url: str | None = None) -> Iterator[Serving]:
    """Up when entered; when left, stopped in order, with every row in SQL."""
    file, home, port = folder / "policy.yaml", folder / "home", free_port()
    file.write_text(policy)
    env = {**os.environ, "LEADLINE_HOME": str(home), **({"DATABASE_URL": database_url} if database_url else {})}
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--policy", str(file)]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_for_port(port, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveness", timeout=30):
            pass
        yield Serving(port, (home / "key").read_text())
    finally:
        stop(process)
    assert process.returncode == 0, (folder / "gateway.log").read_text()[-2000:]
