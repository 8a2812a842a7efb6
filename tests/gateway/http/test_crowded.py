"""Requests and answers that leave together at the loop's next turn: all of them, in order, and none by mistake."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from gateway.edge.asgi import AsgiReply, Receive, Scope, Send
from gateway.edge.protocol import GuardedProtocol
from gateway.upstream.connection import Connection
from gateway.upstream.http import HttpClient, RequestHead
from gateway.upstream.http_errors import ConnectRefused
from tests.edge.raw import guarded, responses_of
from tests.gateway.http.conftest import PATIENT
from tests.gateway.raw_server import raw_server

pytestmark = pytest.mark.anyio

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GOODBYE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection with a request that waits for the loop's next turn, and the server's end."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    _, connection = await loop.create_connection(lambda: Connection(loop, lambda _: None, lambda _: None), sock=near)
    connection.start(b"POST / HTTP/1.1\r\n\r\n", PATIENT, loop.time() + 60, head_only=False, more=False, crowded=True)
    yield connection, far
    connection.abort()
    far.close()


async def arrived(far: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(far, 1 << 16), 30)


async def test_a_request_goes_out_at_the_next_turn() -> None:
    async with linked() as (connection, far):
        with pytest.raises(BlockingIOError):
            far.recv(1)
        assert await arrived(far) == b"POST / HTTP/1.1\r\n\r\n"
        far.send(ANSWER)
        while not connection.complete:
            await connection.wait()
        assert connection.take() == b"ok"
        assert connection.finish()


async def test_a_request_that_is_given_up_before_its_turn_never_goes_out() -> None:
    async with linked() as (connection, far):
        connection.abort()
        assert await arrived(far) == b""


@pytest.mark.parametrize("goodbye", [GOODBYE, b""], ids=["speaks", "leaves"])
async def test_a_server_that_says_goodbye_before_the_request_went_out_has_not_seen_it(goodbye: bytes) -> None:
    """Taken for the answer, it would be billed, and the request would go out on whatever the connection does next."""
    async with linked() as (connection, far):
        if goodbye:
            connection.data_received(goodbye)
        else:
            connection.eof_received()
        assert isinstance(connection.error, ConnectRefused)
        assert not connection.error.may_be_billed
        assert connection.closed
        assert await arrived(far) == b""


async def test_many_at_a_time_each_get_their_own_answer() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await reader.readexactly(4)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n" + body)

    client = HttpClient()
    async with raw_server(echo) as server:
        head = RequestHead("POST", f"http://127.0.0.1:{server.port}/")

        async def ask(number: int) -> None:
            for turn in range(5):
                body = b"%02d%02d" % (number, turn)
                response = await client.request(head, body, PATIENT)
                assert await response.read(100) == body
                response.release()

        await asyncio.gather(*map(ask, range(20)))
        assert client.statistics().in_use == 0
    await client.close()


@pytest.mark.parametrize("then", ["shutdown", "nonsense"])
async def test_an_answer_that_waits_for_its_turn_goes_out_before_its_connection_ends(then: str) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reply = AsgiReply(send)
        if scope["path"] == "/slow":  # somebody else is being served
            entered.set()
            await leave.wait()
        assert reply.exchange is not None
        await reply.whole(200, b"", b"whole")
        protocol: GuardedProtocol = reply.exchange.write_soon.__self__  # type: ignore[attr-defined]
        if scope["path"] == "/slow":
            return
        if then == "shutdown":
            protocol.shutdown()
        else:
            protocol.data_received(b"no such thing\r\n\r\n")

    async with guarded(app) as address:
        slow, slow_writer = await asyncio.open_connection(*address)
        slow_writer.write(b"GET /slow HTTP/1.1\r\nhost: g\r\n\r\n")
        await entered.wait()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: g\r\n\r\n")
        heard = responses_of(await reader.read())
        leave.set()
        (other,) = responses_of(await slow.readuntil(b"whole"))
        for stream in (writer, slow_writer):
            stream.close()
    assert [answer.status for answer in heard] == ([200] if then == "shutdown" else [200, 400])
    assert heard[0].body == other.body == b"whole"
