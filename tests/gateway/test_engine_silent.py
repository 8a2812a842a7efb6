"""An engine that hangs without ending: what callers are told, and when what was in flight ends."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from gateway import engine_link
from gateway.engine_needs import EngineNeeds
from gateway.engine_service import EngineService
from local_engine import client
from tests.gateway.alone import SUM
from tests.gateway.conftest import running, until

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]
READY_S = 200
"""An engine takes half a minute to come up on a busy machine."""
LONG: dict[str, Any] = {"model": "base", "messages": SUM, "temperature": 1, "min_tokens": 900, "n": 8}
SCORE = {"model": "base", "messages": SUM, "candidates": ["5"]}
NEEDS = EngineNeeds(
    models={"base": "bundled/base"}, speculation={}, probe=None, encoder="default", embeds=False, readers={},
    exit_with_parent=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "ASKED_EVERY_S", 0.1)
    monkeypatch.setattr(engine_link, "GIVEN_UP_AFTER_S", 3.0)
    monkeypatch.setattr(client, "COUNTS_WITHIN_S", 10.0)  # who is only slow is not silent; one that hangs soon is


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[EngineService, httpx2.AsyncClient]]:
    """An engine that listens, in this process but for the engine itself, which answers."""
    service = EngineService(NEEDS, folder / "e.sock", None, {})
    config = uvicorn.Config(service.app, port=0, ws="none", lifespan="on", log_level="error")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            async with asyncio.timeout(READY_S):
                while (await http.get("/health")).status_code != 200:
                    await asyncio.sleep(0.05)
            yield service, http
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def hanging(pid: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "COUNTS_WITHIN_S", 1.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            patch.undo()
            os.kill(pid, signal.SIGCONT)


async def test_an_engine_that_hangs_is_said_to_and_what_was_in_flight_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, http):
        assert (await http.get("/health")).json() == {"status": "ready"}
        whole = asyncio.create_task(http.post("/v1/chat/completions", json=LONG))
        async with http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            with hanging(await pid_of(tmp_path)):
                score = asyncio.create_task(http.post("/score", json=SCORE))
                async with asyncio.timeout(60):
                    health = await http.get("/health")
                    assert (health.status_code, health.json()) == (503, {"status": "silent"})
                    while (fresh := await http.get("/v1/models")).status_code == 200:
                        await asyncio.sleep(0.05)
                    chat = await http.post("/v1/chat/completions", json=LONG)
                    rest = [line async for line in lines if line.startswith("data: ")]
                for told in (fresh, chat, await whole, await score):
                    assert (told.status_code, told.json()["error"]["code"]) == (503, "engine_silent")
                    assert "does not answer" in told.json()["error"]["message"]
                    assert "being started" not in told.json()["error"]["message"]
                    assert told.headers["retry-after"] == "1"
                assert '"code":"engine_silent"' in rest[-1]
                assert (await http.get("/health")).json() == {"status": "silent"}
        async with asyncio.timeout(60):
            while (await http.get("/health")).json() != {"status": "ready"}:
                await asyncio.sleep(0.05)
            while "leadline_engine_requests_running 0.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.05)  # what was given up is not computed for nobody
        short = {"model": "base", "messages": SUM, "max_tokens": 2}
        assert (await http.post("/v1/chat/completions", json=short)).status_code == 200


async def test_an_engine_that_is_killed_while_it_hangs_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (_, http):
        pid = await pid_of(tmp_path)
        monkeypatch.setattr(client, "COUNTS_WITHIN_S", 1.0)
        os.kill(pid, signal.SIGSTOP)
        await until_health(http, "silent")
        os.kill(pid, signal.SIGKILL)
        await until_health(http, "starting")
        told = (await http.get("/v1/models")).json()
        assert "object" in told or told["error"]["code"] == "engine_gone"
        await until_health(http, "ready")


async def test_a_short_pause_ends_nothing_that_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "GIVEN_UP_AFTER_S", 30.0)
    async with serving(tmp_path) as (_, http):
        asked = {"model": "base", "messages": SUM, "temperature": 0, "n": 4}
        answer = asyncio.create_task(http.post("/v1/chat/completions", json=asked))
        with hanging(await pid_of(tmp_path)):
            await until_health(http, "silent")
        assert (await answer).status_code == 200


async def test_behind_a_gateway_a_call_in_flight_ends_with_the_silence_not_with_its_timeout(tmp_path: Path) -> None:
    policy = """
version: 1
providers: {home: {engine: embedded, timeout: 10min}}
models: {base: {provider: home, model: bundled/base, context: 1024, price: free}}
"""
    async with running(policy, tmp_path / "home") as gateway:
        engine = gateway.app.engine
        assert engine is not None
        await until(lambda: engine.ready.is_set(), READY_S)
        assert engine.pid is not None
        answer = asyncio.create_task(gateway.chat(LONG))
        await until(lambda: engine.client is not None and engine.client.busy)
        with hanging(engine.pid):
            async with asyncio.timeout(60):
                status, _, body = await answer
        assert (status, body["error"]["code"]) == (503, "unavailable")


async def pid_of(folder: Path) -> int:
    link = client.EngineClient(str(folder / "e.sock"))
    try:
        return (await link.connect()).pid
    finally:
        await link.close()


async def until_health(http: httpx2.AsyncClient, word: str) -> None:
    async with asyncio.timeout(READY_S):
        while (await http.get("/health")).json() != {"status": word}:
            await asyncio.sleep(0.02)
