"""Which connections serve again, and for how long."""

import asyncio
import socket
import threading
import time

import pytest

from gateway.upstream import connection, http
from gateway.upstream import http_errors as errors
from gateway.upstream.connection import AFTER_STREAM_S
from gateway.upstream.http import HttpClient, RequestHead, Statistics
from tests.gateway.conftest import until
from tests.gateway.http.conftest import CHUNKED, HELLO, NOTHING, PATIENT, START, hangs, to, whole
from tests.gateway.raw_server import in_pieces, raw_server

pytestmark = pytest.mark.anyio


async def test_a_connection_that_its_server_closed_is_not_used_again(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        await whole(client, to(server))
        server.writers[0].close()
        await until(lambda: client.statistics() == NOTHING)
        assert await whole(client, to(server)) == b"hello"
        assert server.connections == 2


async def test_an_idle_connection_that_speaks_is_not_used_again(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        await whole(client, to(server))
        server.writers[0].write(HELLO)
        await until(lambda: client.statistics() == NOTHING)
        assert await whole(client, to(server)) == b"hello"
        assert server.connections == 2


async def test_a_goodbye_that_the_loop_has_not_read_yet_is_noticed(client: HttpClient) -> None:
    """The loop was busy while the server closed: without a look at the socket, a paid call would be lost."""
    answered, left, served = threading.Event(), threading.Event(), 0
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            nonlocal served
            for _ in range(2):
                accepted = listening.accept()[0]
                accepted.recv(1 << 16)
                served += 1
                accepted.sendall(HELLO)
                answered.wait(30)
                accepted.close()
                left.set()

        thread = threading.Thread(target=serve)
        thread.start()
        head = RequestHead("POST", f"http://127.0.0.1:{listening.getsockname()[1]}/")
        assert await whole(client, head) == b"hello"
        answered.set()
        assert left.wait(30)
        time.sleep(1.2)  # noqa: ASYNC251 - it is the loop that must not run
        assert await whole(client, head) == b"hello"
        assert served == 2
        await asyncio.to_thread(thread.join)


async def test_nobody_is_asked_on_the_way_out(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's server closes after every stream and does not say so: a request could be sent to a closed door."""
    monkeypatch.setattr(connection, "AFTER_STREAM_S", 60.0)  # a busy machine is late with the server's goodbye

    async def leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await writer.drain()
        await asyncio.sleep(0.005)
        writer.close()

    async with raw_server(leaves) as server:
        for call in range(1, 11):
            assert await whole(client, to(server)) == b"hello"
            assert server.connections == call
        server.plays[:] = [HELLO]
        for _ in range(5):  # what comes whole leaves the connection open
            assert await whole(client, to(server)) == b"hello"
        assert server.connections == 11


async def test_a_connection_that_outlives_a_stream_serves_again_at_once(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with raw_server(CHUNKED) as server:
        await whole(client, to(server))
        await asyncio.sleep(2 * AFTER_STREAM_S)
        for _ in range(5):
            await whole(client, to(server))
        assert server.connections == 1
        monkeypatch.setattr(connection, "AFTER_STREAM_S", 60.0)  # none has rested, however late all of this is
        server.writers[0].close()  # for whatever reason: it is in doubt again whether the server stays
        await until(lambda: client.statistics() == NOTHING)
        for _ in range(2):
            await whole(client, to(server))
        assert server.connections == 3


@pytest.mark.parametrize(("late_s", "pause_s"), [(0.005, 0.0), (0.12, 0.06)])
async def test_a_server_that_left_under_a_request_is_asked_on_no_such_connection_for_a_while(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, late_s: float, pause_s: float
) -> None:
    """One that stayed makes way for one that leaves; or it leaves later than a connection rests."""

    async def leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await writer.drain()
        await asyncio.sleep(late_s)
        writer.close()

    async def cut(calls: int) -> int:
        found = 0
        for _ in range(calls):
            try:
                await whole(client, to(server))
            except errors.ClosedBeforeHeaders:
                found += 1
            await asyncio.sleep(pause_s)
        return found

    async with raw_server(CHUNKED) as server:
        await whole(client, to(server))
        await asyncio.sleep(2 * AFTER_STREAM_S)
        assert await cut(3) == 0
        server.plays[:] = [leaves]
        assert await cut(10) == 1
        monkeypatch.setattr(http, "FORGIVEN_AFTER_S", 0.0)
        server.plays[:] = [CHUNKED]
        await asyncio.sleep(2 * late_s)
        before = server.connections
        for _ in range(3):
            await whole(client, to(server))
            await asyncio.sleep(2 * AFTER_STREAM_S)
        assert server.connections == before + 1


async def test_idle_connections_grow_old_and_few() -> None:
    client = HttpClient(keep_alive_s=2, max_idle=2)
    async with raw_server(HELLO) as server:
        await asyncio.gather(*[whole(client, to(server)) for _ in range(5)])
        assert client.statistics() == Statistics(open=2, idle=2, in_use=0, connecting=0)
        await until(lambda: client.statistics() == NOTHING)
        await until(lambda: server.left == 5)
    await client.close()


async def test_the_rest_of_a_stream_is_read_beside_its_reader(client: HttpClient) -> None:
    async with raw_server(in_pieces(START, b"0\r\n\r\n", pause_s=0.1)) as server:
        for _ in range(2):
            response = await client.request(to(server), b"", PATIENT)
            assert await response.read_some() == b"hel"
            response.release(linger_s=30)
            await until(lambda: client.statistics().idle == 1)
            await asyncio.sleep(2 * AFTER_STREAM_S)
        assert server.connections == 1
    async with raw_server(in_pieces(START, START * 20_000, b"", pause_s=0.1)) as endless:
        response = await client.request(to(endless), b"", PATIENT)
        await response.read_some()
        response.release(linger_s=30)
        await until(lambda: client.statistics().in_use == 0 and endless.left == 1)
    async with raw_server(in_pieces(START, b"", pause_s=30)) as silent:
        response = await client.request(to(silent), b"", PATIENT)
        await response.read_some()
        response.release(linger_s=0.05)
        await until(lambda: client.statistics().in_use == 0)


async def test_closing_the_client_ends_what_is_under_way() -> None:
    client = HttpClient()
    async with raw_server(hangs) as server:
        call = asyncio.ensure_future(whole(client, to(server)))
        await until(lambda: server.requests)
        await client.close()
        with pytest.raises(errors.ConnectionCut):
            await call
        with pytest.raises(RuntimeError):
            await whole(client, to(server))
    assert client.statistics() == NOTHING
