"""HTTP/1.1 by hand: what a client library would never send, and what comes back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvicorn

from gateway.edge.asgi import Receive, Scope, Send
from gateway.edge.protocol import GuardedProtocol
from tests.gateway.conftest import Gateway, until

App = Callable[[Scope, Receive, Send], Awaitable[None]]
READ_S = 20.0


@dataclass(frozen=True)
class Response:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def responses_of(raw: bytes) -> list[Response]:
    """Every response in what a connection said; interim ones are left out."""
    found = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status = status_line.split(" ")[:2]
        assert version == "HTTP/1.1", f"not the start of a response: {status_line[:100]!r}"
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        if status == "100":
            raw = rest
            continue
        lengths = [int(value) for name, value in headers if name == "content-length"]
        assert len(lengths) <= 1, "two lengths in one response"
        if lengths:
            body, raw = rest[: lengths[0]], rest[lengths[0] :]
        else:
            assert ("transfer-encoding", "chunked") in headers
            body, raw = _dechunk(rest)
        found.append(Response(int(status), headers, body))
    return found


def _dechunk(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        body += raw[:length]
        raw = raw[length + 2 :]
        if not length:
            break
    return body, raw


@contextlib.asynccontextmanager
async def guarded(app: App) -> AsyncIterator[tuple[str, int]]:
    """Serve an ASGI app by our own protocol alone; its address."""
    config = uvicorn.Config(
        app, port=0, http=GuardedProtocol, lifespan="off", log_level="error", server_header=False, date_header=False
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    await serving


async def exchange(gateway: Gateway, *parts: bytes, pause_s: float = 0.02) -> bytes:
    """All that the server says to these bytes, until it closes the connection."""
    address = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    heard = b""
    try:
        with contextlib.suppress(ConnectionError):
            for place, part in enumerate(parts):
                if place:
                    await asyncio.sleep(pause_s)
                writer.write(part)
                await writer.drain()
        async with asyncio.timeout(READ_S):
            with contextlib.suppress(ConnectionError):
                while chunk := await reader.read(1 << 16):
                    heard += chunk
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return heard
