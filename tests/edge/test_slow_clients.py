"""A client that drips, stops, or does not read is cut off; the others notice nothing (T9)."""

import asyncio
import contextlib
import gc
import json
import time
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from gateway.edge.protocol import GuardedProtocol
from tests.conftest import Size
from tests.edge.conftest import StartEdge, post
from tests.edge.provider import Provider
from tests.edge.raw import responses_of
from tests.faults.test_fault_matrix import open_sockets
from tests.gateway.conftest import Gateway, until

pytestmark = pytest.mark.anyio


SOAK_S = 600
MAX_GROWTH_BYTES = 100 << 20


class Hasty(GuardedProtocol):
    HEADERS_TIMEOUT_S = 1.0
    BODY_GRACE_S = 1.0
    WRITE_STALL_S = 1.0


class Impatient(GuardedProtocol):
    HEADERS_TIMEOUT_S = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = 1


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(gateway.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def drip(gateway: Gateway, start: bytes, endless: bytes, pause_s: float = 0.05) -> list[int]:
    """One byte at a time until the server has enough of it; the statuses it answered with."""
    reader, writer = await connect(gateway)
    hearing = asyncio.create_task(reader.read())
    writer.write(start)
    while not hearing.done():
        with contextlib.suppress(ConnectionError):
            writer.write(endless)
            await writer.drain()
        await asyncio.wait((hearing,), timeout=pause_s)
    writer.close()
    return [] if hearing.exception() else [response.status for response in responses_of(hearing.result())]


async def slow_clients(gateway: Gateway) -> dict[str, float]:
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    found = [line for line in lines if line.startswith("leadline_slow_clients_total")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}


async def test_50_that_drip_are_closed_while_others_are_served(start_edge: StartEdge) -> None:
    async with start_edge(http=Hasty) as edge:
        await wave(edge, 10, pause_s=0.05)
        counted = await slow_clients(edge)
        assert (counted["headers"], counted["body"]) == (20, 30)
        assert all(row["outcome"] == "ok" for row in await edge.rows())


async def test_wave_after_wave_of_dripping_clients_leaves_nothing_behind(start_edge: StartEdge, size: Size) -> None:
    seconds = size(0, SOAK_S)
    count, pause_s, http = (100, 1.0, GuardedProtocol) if seconds else (4, 0.05, Hasty)
    async with start_edge(http=http) as edge:
        await wave(edge, count, pause_s)
        gc.collect()
        process = psutil.Process()
        rss, sockets, tasks = process.memory_info().rss, open_sockets(), len(asyncio.all_tasks())
        ends = time.monotonic() + seconds
        waves = 1
        while waves < 2 or time.monotonic() < ends:
            await wave(edge, count, pause_s)
            waves += 1
        counted = await slow_clients(edge)
        assert (counted["headers"], counted["body"]) == (2 * count * waves, 3 * count * waves)
        await until(lambda: open_sockets() <= sockets and len(asyncio.all_tasks()) <= tasks)
        assert process.memory_info().rss - rss < MAX_GROWTH_BYTES


async def wave(edge: Gateway, count: int, pause_s: float) -> None:
    """Five times `count` drip, headers and bodies, on the data plane and beside it; others are served meanwhile."""
    key = edge.key.encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key + b"\r\n"
    body = head + b"content-length: 100000\r\n\r\n{"
    web = (
        b"POST /leadline/v1/explain HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key
        + b"\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{"
    )  # fmt: skip
    headers = [drip(edge, b"POST /v1/chat/completions HTTP/1.1\r\nx-a: ", b"a", pause_s) for _ in range(2 * count)]
    bodies = [drip(edge, body, b" ", pause_s) for _ in range(2 * count)]
    elsewhere = [drip(edge, web, b" ", pause_s) for _ in range(count)]
    slow = asyncio.gather(*headers, *bodies, *elsewhere)
    for number in range(20):
        asked = {"model": "chat", "messages": [{"role": "user", "content": f"healthy {number}"}]}
        assert (await post(edge, "/v1/chat/completions", asked))[0] == 200
    async with asyncio.timeout(60):
        statuses = await slow
    assert set(map(tuple, statuses)) <= {(408,), ()}, "told so, unless the client was in the middle of a byte"


async def test_a_connection_that_says_nothing_is_closed(start_edge: StartEdge) -> None:
    async with start_edge(http=Hasty) as edge:
        reader, writer = await connect(edge)
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()


async def test_a_connection_that_has_its_answer_is_kept_for_a_while_and_then_closed(start_edge: StartEdge) -> None:
    async with start_edge(http=Impatient) as edge:
        reader, writer = await connect(edge)
        for _ in range(3):
            writer.write(b"GET /health/liveness HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"alive")
        async with asyncio.timeout(60):
            rest = await reader.read()
        writer.close()
        assert b"HTTP/1.1" not in rest, "closed without a word: it is the client who would speak next"
        assert "headers" not in await slow_clients(edge), "and it was not slow"


async def test_no_connection_is_idle_while_its_answer_goes_on(start_edge: StartEdge, provider: Provider) -> None:
    provider.endless = True
    async with start_edge(http=Impatient) as edge:
        reader, writer = await connect(edge)
        body = b'{"model":"chat","messages":[{"role":"user","content":"x"}],"stream":true}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + edge.key.encode()
            + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )  # fmt: skip
        ends = time.monotonic() + 2.5
        while time.monotonic() < ends:
            assert await reader.read(1 << 16), "still open"
        writer.close()
        await until(lambda: provider.open_streams == 0)


async def test_a_body_that_comes_steadily_is_waited_for(start_edge: StartEdge, provider: Provider) -> None:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "x"}]}).encode().ljust(130_000)
    async with start_edge(http=Hasty) as edge:
        reader, writer = await connect(edge)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer "
            + edge.key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
        )  # fmt: skip
        for at in range(0, len(body), 10_000):
            writer.write(body[at : at + 10_000])
            await asyncio.sleep(0.12)
        (response,) = responses_of(await reader.read())
        writer.close()
    assert response.status == 200, "for longer than the grace, but faster than the least rate"
    assert len(provider.bodies) == 1


async def test_a_reader_that_takes_nothing_is_cut_and_billed(start_edge: StartEdge, provider: Provider) -> None:
    provider.endless = True
    async with start_edge(http=Hasty) as edge:
        reader, writer = await connect(edge)
        body = b'{"model":"chat","messages":[{"role":"user","content":"x"}],"stream":true}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + edge.key.encode()
            + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )  # fmt: skip
        async with asyncio.timeout(60):
            while (await slow_clients(edge)).get("read") != 1:
                await asyncio.sleep(0.1)
        await until(lambda: provider.open_streams == 0)
        assert not reader.at_eof()
        (row,) = await edge.rows()
        assert (row["outcome"], row["cost_estimated"]) == ("cancelled", True)
        assert row["cost_nanousd"] > 0
        writer.close()
