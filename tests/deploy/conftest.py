"""Gateways as operators run them: `python -m gateway serve --workers N` on a real Redis and a real PostgreSQL."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.conftest import free_port, stop
from tests.gateway.fake_upstream import FakeUpstream

ROOT = Path(__file__).parents[2]
POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 30s, retries: 0}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
routes:
  - {{name: auto, when: {{model: auto}}, use: [cheap]}}
"""
PATIENCE_S = 60.0


def environment(home: Path, **more: str) -> dict[str, str]:
    """Ours, without what would change the gateway under test."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LEADLINE_", "OPENAI_"))}
    for name in ("DATABASE_URL", "REDIS_URL"):
        ours.pop(name, None)
    return {**ours, "LEADLINE_HOME": str(home), **more}


@dataclass
class Deployment:
    """A parent process with its workers."""

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    log: Path
    env: dict[str, str]
    keys: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return (self.home / "key").read_text()

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log with this event, oldest first."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "gateway.worker" in child.cmdline():
                    found.append(child)
        return found

    async def until(self, condition: Any, what: str, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"{what}: {self.log.read_text()[-3000:]}"
            await asyncio.sleep(0.02)

    async def roll(self) -> None:
        """One rolling restart, to its end."""
        before = len(self.events("restart.ends"))
        self.process.send_signal(signal.SIGHUP)
        await self.until(lambda: len(self.events("restart.ends")) > before, "the rolling restart did not end")


def _start(
    home: Path, policy: str, port: int, *options: str, **env: str
) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    home.mkdir(exist_ok=True)
    file = home / "policy.yaml"
    file.write_text(policy)
    whole = environment(home, **env)
    with (home / "out").open("wb") as out, (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--policy", str(file), *options]
        return subprocess.Popen(command, env=whole, cwd=ROOT, stdout=out, stderr=log), whole


@contextlib.asynccontextmanager
async def deployed(home: Path, policy: str, *options: str, **env: str) -> AsyncIterator[Deployment]:
    """`leadline serve` with these options, from the moment it says that it is ready."""
    port = free_port()
    process, whole = _start(home, policy, port, *options, **env)
    running = Deployment(process, f"http://127.0.0.1:{port}", home, home / "log", whole)
    try:
        await running.until(lambda: "Try next" in (home / "out").read_text(), "the gateway did not start")
        yield running
    finally:
        await asyncio.to_thread(stop, process)


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    fake = await FakeUpstream().start()
    yield fake
    await fake.stop()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def two_workers(redis_url: str, postgres_url: str) -> dict[str, str]:
    """The environment that several workers need."""
    return {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url}
