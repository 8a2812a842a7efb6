"""A client that drips, stops, or does not read is cut off; the others notice nothing (T9)."""

import asyncio
import contextlib
import json
from urllib.parse import urlsplit

import pytest

from gateway.edge.protocol import GuardedProtocol
from tests.edge.conftest import StartEdge, post
from tests.edge.provider import Provider
from tests.edge.raw import responses_of
from tests.gateway.conftest import Gateway, until

pytestmark = pytest.mark.anyio


class Hasty(GuardedProtocol):
    HEADERS_TIMEOUT_S = 1.0
    BODY_GRACE_S = 1.0
    WRITE_STALL_S = 1.0


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(gateway.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def drip(gateway: Gateway, start: bytes, endless: bytes) -> list[int]:
    """One byte every 50 ms until the server has enough of it; the statuses it answered with."""
    reader, writer = await connect(gateway)
    hearing = asyncio.create_task(reader.read())
    writer.write(start)
    while not hearing.done():
        with contextlib.suppress(ConnectionError):
            writer.write(endless)
            await writer.drain()
        await asyncio.wait((hearing,), timeout=0.05)
    writer.close()
    return [] if hearing.exception() else [response.status for response in responses_of(hearing.result())]


async def slow_clients(gateway: Gateway) -> dict[str, float]:
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    found = [line for line in lines if line.startswith("leadline_slow_clients_total")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}


async def test_50_that_drip_are_closed_while_others_are_served(start_edge: StartEdge) -> None:
    async with start_edge(http=Hasty) as edge:
        key = edge.key.encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key + b"\r\n"
        headers = [drip(edge, b"POST /v1/chat/completions HTTP/1.1\r\nx-a: ", b"a") for _ in range(20)]
        bodies = [drip(edge, head + b"content-length: 100000\r\n\r\n{", b" ") for _ in range(20)]
        elsewhere = [drip(edge, b"POST /leadline/v1/explain HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key +
                          b"\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{", b" ")
                     for _ in range(10)]  # fmt: skip
        slow = asyncio.gather(*headers, *bodies, *elsewhere)
        for number in range(20):
            body = {"model": "chat", "messages": [{"role": "user", "content": f"healthy {number}"}]}
            assert (await post(edge, "/v1/chat/completions", body))[0] == 200
        async with asyncio.timeout(60):
            statuses = await slow
        assert set(map(tuple, statuses)) <= {(408,), ()}, "told so, unless the client was in the middle of a byte"
        counted = await slow_clients(edge)
        assert (counted["headers"], counted["body"]) == (20, 30)
        assert all(row["outcome"] == "ok" for row in await edge.rows())


async def test_a_connection_that_says_nothing_is_closed(start_edge: StartEdge) -> None:
    async with start_edge(http=Hasty) as edge:
        reader, writer = await connect(edge)
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()


async def test_a_body_that_comes_steadily_is_waited_for(start_edge: StartEdge, provider: Provider) -> None:
    text = "x" * 12_000
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": text}]}).encode()
    async with start_edge(http=Hasty) as edge:
        reader, writer = await connect(edge)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer "
            + edge.key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
        )  # fmt: skip
        for at in range(0, len(body), 1000):
            writer.write(body[at : at + 1000])
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
