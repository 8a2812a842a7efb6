"""Slow readers, long requests and calls that are left: bounded, and nothing leaks."""

import asyncio
import contextlib

import pytest

from gateway.upstream import http_errors as errors
from gateway.upstream.connection import HIGH_WATER
from gateway.upstream.http import HttpClient
from tests.gateway.conftest import until
from tests.gateway.http.conftest import CHUNKED, HELLO, NOTHING, OK, PATIENT, START, to, whole
from tests.gateway.raw_server import in_pieces, raw_server, then_close

pytestmark = pytest.mark.anyio


async def test_a_slow_reader_makes_a_fast_server_wait(client: HttpClient) -> None:
    size, sent = 64 << 20, 0
    block = bytes(1 << 18)

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(block)
            sent += len(block)
            await writer.drain()

    async with raw_server(flood) as server:
        response = await client.request(to(server), b"", PATIENT)
        before = -1
        while before != sent:  # until the server is stuck
            before = sent
            await asyncio.sleep(0.2)
        assert sent < size // 2
        largest = total = 0
        while part := await response.read_some():
            largest, total = max(largest, len(part)), total + len(part)
        response.release()
        assert total == size
        assert largest <= HIGH_WATER + (1 << 18)
        assert client.statistics().idle == 1


async def test_what_arrives_is_handed_over_in_the_read_itself_as_long_as_it_is_taken(client: HttpClient) -> None:
    pieces = [b"%d," % number for number in range(40)]
    asked = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for number, piece in enumerate(pieces):
            if number == 20:
                await asked.wait()
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")

    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return b"9," not in data

    async with raw_server(drip) as server:
        response = await client.request(to(server), b"", PATIENT)
        while not b"".join(taken).endswith(b"19,"):
            await response.hand_over(take)
        asked.set()
        taken.append(await response.read_some())  # by turns with reads of the other kind
        while rest := await response.read_some():
            taken.append(rest)
            await response.hand_over(take)
        response.release()
        assert b"".join(taken) == b"".join(pieces)
        assert client.statistics().idle == 1


async def test_who_takes_and_fails_or_leaves_costs_the_connection(client: HttpClient) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.001)

    taken = 0

    def fails(data: bytes) -> bool:
        raise KeyError("no place for it")

    def counts(data: bytes) -> bool:
        nonlocal taken
        taken += len(data)
        return True

    async with raw_server(drip) as server:
        response = await client.request(to(server), b"", PATIENT)
        with pytest.raises(KeyError, match="no place for it"):
            await response.hand_over(fails)
        response.release()
        response = await client.request(to(server), b"", PATIENT)
        handing = asyncio.create_task(response.hand_over(counts))
        await until(lambda: taken > 3)
        handing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handing
        at_the_end = taken
        await until(lambda: server.left == 2)
        assert taken == at_the_end
        assert client.statistics() == NOTHING


async def test_a_body_that_breaks_off_is_handed_over_up_to_there(client: HttpClient) -> None:
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    async with raw_server(then_close(START)) as server:
        response = await client.request(to(server), b"", PATIENT)
        await response.hand_over(take)
        with pytest.raises(errors.TruncatedBody):
            await response.read_some()
        response.release()
        assert taken == [b"hel"]


async def test_a_long_request_goes_out_whole(client: HttpClient) -> None:
    body, seen = bytes(range(256)) * (1 << 15), b""

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await asyncio.sleep(0.1)
        seen = await reader.readexactly(len(body))
        writer.write(HELLO)

    async with raw_server(slowly) as server:
        for _ in range(2):
            assert await whole(client, to(server), body) == b"hello"
            assert seen == body
        assert server.connections == 1


async def test_an_answer_before_the_end_of_the_request_costs_the_connection(client: HttpClient) -> None:
    too_large = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    async with raw_server(in_pieces(too_large, b"", pause_s=0.5), HELLO) as server:
        response = await client.request(to(server), bytes(64 << 20), PATIENT)
        assert response.status == 413
        response.release()
        assert client.statistics() == NOTHING


# cancellation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["connecting", "uploading", "waiting", "reading"])
async def test_a_call_that_is_cancelled_closes_its_connection_at_once(client: HttpClient, phase: str) -> None:
    async def takes_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await reader.read()

    play = in_pieces(START, b"", pause_s=0.3) if phase == "reading" else takes_nothing
    async with raw_server(play) as server:
        head = to(server, scheme="https" if phase == "connecting" else "http")
        call = asyncio.ensure_future(whole(client, head, bytes(64 << 20) if phase == "uploading" else b""))
        if phase == "connecting":
            await until(lambda: server.connections)
            assert client.statistics().connecting == 1
        else:
            await until(lambda: server.requests)
            assert client.statistics().in_use == 1
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client.statistics() == NOTHING
        await until(lambda: server.left == 1)


async def test_a_call_cancelled_at_any_moment_leaks_nothing(client: HttpClient) -> None:
    async with raw_server(in_pieces(CHUNKED[:50], CHUNKED[50:], pause_s=0)) as server:
        for turns in range(40):
            call = asyncio.ensure_future(whole(client, to(server)))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert client.statistics().in_use == 0
            assert client.statistics().connecting == 0
        assert await whole(client, to(server)) == b"hello"
