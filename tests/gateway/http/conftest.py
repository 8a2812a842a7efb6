"""The HTTP client against servers that send bytes by script, on asyncio's own loop and on uvloop."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.upstream.connection import Timeouts
from gateway.upstream.http import HttpClient, RequestHead, Statistics
from tests.gateway.raw_server import RawServer

PATIENT = Timeouts(connect_s=30, first_byte_s=30, idle_s=30, total_s=30)
NOTHING = Statistics(open=0, idle=0, in_use=0, connecting=0)
HELLO = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
START = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    """After each test: everything closed, nothing forgotten."""
    client = HttpClient()
    yield client
    await client.close()
    assert client.statistics() == NOTHING


def to(server: RawServer, method: str = "POST", scheme: str = "http", host: str = "127.0.0.1") -> RequestHead:
    return RequestHead(method, f"{scheme}://{host}:{server.port}/v1/x", [("X-A", "b")])


async def whole(client: HttpClient, head: RequestHead, body: bytes = b"{}", timeouts: Timeouts = PATIENT) -> bytes:
    response = await client.request(head, body, timeouts)
    try:
        return await response.read(1 << 30)
    finally:
        response.release()


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
