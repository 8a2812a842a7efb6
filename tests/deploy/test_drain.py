"""A server that is told to stop, seen from its connections: an idle one, one with an answer under way, one too long."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.edge.asgi import Receive, Scope, Send
from gateway.http_server import IDLE_GRACE_S, HttpServer
from tests.gateway.conftest import until

pytestmark = pytest.mark.anyio
ASK = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
SLOWLY = ASK.replace(b"/ ", b"/slow ")


@dataclass
class Application:
    """Answers at once, or when `go` is set."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    cancelled: int = 0
    stopped: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.stopped = True
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/slow":
            self.waiting += 1
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def slow_client(self, phase: str) -> None:
        raise AssertionError(phase)


@dataclass
class Running:
    app: Application
    server: HttpServer
    port: int
    task: "asyncio.Task[None]"

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def drain(self) -> None:
        """Tell it to stop, and wait until it takes no more connections."""
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not self.server.servers[0].is_serving())


@contextlib.asynccontextmanager
async def running(drain_s: float) -> AsyncIterator[Running]:
    app = Application()
    server = HttpServer(app, drain_s)
    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    task = asyncio.create_task(server.serve_on(listener))
    await until(lambda: server.started)
    yield Running(app, server, port, task)
    server.should_exit = True
    await asyncio.wait_for(task, 60)
    assert app.stopped


async def answer(reader: asyncio.StreamReader) -> Any:
    head = await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(2) == b"ok"
    return head.lower()


async def test_an_idle_connection_is_answered_once_more_and_told_to_go() -> None:
    async with running(drain_s=30) as server, server.connected() as (reader, writer):
        writer.write(ASK)
        assert b"connection: close" not in await answer(reader)
        await server.drain()
        writer.write(ASK)
        assert b"connection: close" in await answer(reader)
        assert await reader.read() == b"", "and closed after it"


async def test_a_connection_that_stays_idle_is_closed_after_its_grace() -> None:
    async with running(drain_s=30) as server, server.connected() as (reader, writer):
        writer.write(ASK)
        await answer(reader)
        began = time.monotonic()
        await server.drain()
        assert await reader.read() == b""
        assert time.monotonic() - began >= IDLE_GRACE_S * 0.9


async def test_an_answer_under_way_ends_as_it_would_have() -> None:
    async with running(drain_s=30) as server, server.connected() as (reader, writer):
        writer.write(SLOWLY)
        await until(lambda: server.app.waiting)
        await server.drain()
        await asyncio.sleep(IDLE_GRACE_S * 1.2)  # it is no idle connection
        server.app.go.set()
        assert b"connection: close" in await answer(reader)
    assert server.app.cancelled == 0


async def test_what_outlives_the_drain_is_cancelled_and_the_application_stops_after_it() -> None:
    async with running(drain_s=0.1) as server, server.connected() as (reader, writer):
        writer.write(SLOWLY)
        await until(lambda: server.app.waiting)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server.task, 60)
        assert (server.app.cancelled, server.app.stopped) == (1, True)
        with contextlib.suppress(ConnectionError):
            assert b"200" not in await reader.read()
