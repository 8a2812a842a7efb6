"""`leadline engine --listen` as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psutil

from tests.conftest import free_port, stop

TOKEN = "a-token-of-the-test"
SUM: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
START_S = 300


class Service(NamedTuple):
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Service]:
    """Until it is left; then it has to end well."""
    port = free_port()
    command = [sys.executable, "-m", "gateway", "engine", "--listen", f"127.0.0.1:{port}", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "LEADLINE_ENGINE_TOKEN": TOKEN}, stdout=log, stderr=log)
        try:
            wait(lambda: process.poll() is not None or healthy(f"http://127.0.0.1:{port}"))
            assert process.poll() is None, (folder / "log").read_text()
            yield Service(f"http://127.0.0.1:{port}", process, folder / "log")
        finally:
            stop(process)
    assert process.returncode == 0


def healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def wait(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)
