"""The engine as its own process: started, streamed from, told to stop, killed, orphaned."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

import local_engine
from local_engine.client import EngineClient
from local_engine.errors import EngineGone
from local_engine.types import Delta, SamplingParams
from tests.local_engine.engine_harness import GREEDY, PATIENCE_S, until, user

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]
ROOT = Path(local_engine.__file__).parents[1]
NOISE = SamplingParams(temperature=50.0, seed=1)
"""Its turns hardly ever end before the window does; many of them are not over when this process comes to stop them."""
ENGINE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from local_engine.config import EngineConfig
from local_engine.server import run_engine
from tests.local_engine.fake_prober import FakeProber
run_engine(EngineConfig(models={{"m": "bundled/base"}}, socket_path=sys.argv[1], threads=1), FakeProber())
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
sys.stdin.read()
"""


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "e.sock")


@pytest.fixture
async def process(socket_path: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ENGINE, socket_path)
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def connected(socket_path: str) -> EngineClient:
    client = EngineClient(socket_path)
    async with asyncio.timeout(3 * PATIENCE_S):  # torch is imported on a busy machine
        while not client.connected:
            try:
                await client.connect()
            except EngineGone:
                await asyncio.sleep(0.05)
    return client


async def test_a_killed_engine_is_noticed_at_once(process: asyncio.subprocess.Process, socket_path: str) -> None:
    client = await connected(socket_path)
    assert client.hello.pid == process.pid
    answer = [event async for event in client.generate("m", user("What is 3 + 4?"), GREEDY)]
    assert "".join(event.content for event in answer if isinstance(event, Delta)) == "The answer is 7."
    assert (await client.probe(user("abc"))).p_success == {"m": 0.25}
    async with aclosing(client.generate("m", user("What is 3 + 4?"), NOISE, n=64)) as stream:
        await anext(stream)
        process.kill()
        with pytest.raises(EngineGone):
            async for _ in stream:
                pass
    assert not client.connected
    await client.close()


async def test_told_to_stop_it_ends_what_runs_and_leaves(process: asyncio.subprocess.Process, socket_path: str) -> None:
    client = await connected(socket_path)
    async with aclosing(client.generate("m", user("What is 3 + 4?"), NOISE, n=64)) as stream:
        await anext(stream)
        process.send_signal(signal.SIGTERM)
        events = [event async for event in stream]
    assert getattr(events[-1], "finish_reason", None) == "cancelled"
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 0
    assert not Path(socket_path).exists()
    await client.close()


async def test_no_engine_outlives_its_parent(socket_path: str) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, ENGINE, socket_path, stdin=asyncio.subprocess.PIPE
    )
    client = await connected(socket_path)
    parent.kill()
    await parent.wait()
    await until(lambda: not client.connected)
    await client.close()
