"""Our short way out of uvicorn: callers who pipeline, ask for a head alone, or leave while it reads nothing."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.edge.asgi import AsgiReply, Receive, Scope, Send
from gateway.edge.protocol import GuardedProtocol
from tests.edge.conftest import StartEdge
from tests.edge.provider import Provider
from tests.edge.raw import exchange, guarded, responses_of
from tests.faults.load import chat_request
from tests.faults.test_disconnect import POLICY
from tests.gateway.conftest import Gateway, running, until
from tests.upstream.server import Upstream

pytestmark = pytest.mark.anyio

LONG = "how deep is it " * 4_500
"""Above what uvicorn reads ahead, and small enough to come at once."""
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
NEVER = {"words": "1", "pace_ms": "600000"}


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop is what `leadline serve` runs on; its transports pause, close and hear hang-ups in their own way."""
    return "asyncio", {"use_uvloop": request.param}


class Impatient(GuardedProtocol):
    DISCARD_S = 0.05


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Upstream]:
    server = await Upstream(tmp_path / "truth").start()
    yield server
    await server.stop()


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(gateway.url)
    return await asyncio.open_connection(address.hostname, address.port)


def asks(gateway: Gateway, call: str, metadata: dict[str, str], **fields: Any) -> bytes:
    body = {"model": "cheap", "messages": [{"role": "user", "content": "x"}], "metadata": metadata, **fields}
    return chat_request(gateway.key, call, body)


def asked(gateway: Gateway, text: str, *lines: str) -> bytes:
    """A call of the edge's own policy, the last of its connection if `lines` say so."""
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": text}]})
    head = ["POST /v1/chat/completions HTTP/1.1", "host: g", f"authorization: Bearer {gateway.key}", *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", body]).encode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health/liveness", "/nowhere"])
async def test_a_head_has_no_body_and_the_next_request_its_own_answer(start_edge: StartEdge, path: str) -> None:
    async with start_edge() as edge:
        head = f"HEAD {path} HTTP/1.1\r\nhost: g\r\n\r\n".encode()
        heard = await exchange(edge, head + asked(edge, "one", "connection: close"))
    first, _, rest = heard.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 ")
    (answer,) = responses_of(rest)
    assert answer.status == 200
    assert json.loads(answer.body)["choices"]


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_caller_with_a_long_conversation_is_heard_when_it_leaves(
    upstream: Upstream, tmp_path: Path, pieces: int
) -> None:
    policy = POLICY.format(url=upstream.url).replace("context: 16000", "context: 200000")
    async with running(policy, tmp_path / "home") as gateway:
        raw = asks(gateway, "long", NEVER, messages=[{"role": "user", "content": LONG}])
        at = raw.index(b"\r\n\r\n") + 4 if pieces == 2 else len(raw)
        _, writer = await connect(gateway)
        writer.write(raw[:at])
        await asyncio.sleep(0.1)  # it waits for the body by now; that comes in one piece
        writer.write(raw[at:])
        await until(lambda: bool(upstream.running))
        writer.close()
        await until(lambda: not upstream.running)
        (row,) = await gateway.rows()
    assert row["outcome"] == "cancelled"


async def test_a_caller_who_pipelines_is_heard_when_it_leaves(upstream: Upstream, tmp_path: Path) -> None:
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
        _, writer = await connect(gateway)
        writer.write(b"".join(asks(gateway, call, NEVER) for call in ("first", "second", "third")))
        await until(lambda: bool(upstream.running))
        writer.close()
        await until(lambda: not upstream.running)
        (row,) = await gateway.rows()
        assert (row["session"], row["outcome"]) == ("first", "cancelled"), "what waited was never begun"
        assert (await gateway.chat({"model": "cheap", "messages": [{"role": "user", "content": "x"}]}))[0] == 200


async def test_a_pipelined_body_may_take_its_time(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge(http=Impatient) as edge:
        second = asked(edge, "second", "connection: close")
        heard = await exchange(edge, asked(edge, "first") + second[:-5], second[-5:], pause_s=0.5)
    assert [answer.status for answer in responses_of(heard)] == [200, 200]
    assert [json.loads(body)["messages"][0]["content"] for body in provider.bodies] == ["first", "second"]


@pytest.mark.parametrize("next_request", ["malformed", "malformed body"])
async def test_nothing_is_written_into_an_answer_under_way(
    upstream: Upstream, tmp_path: Path, next_request: str
) -> None:
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
        reader, writer = await connect(gateway)
        writer.write(asks(gateway, "first", {"words": "100", "reasoning": "0", "pace_ms": "50"}, stream=True))
        heard = await reader.readuntil(b'"content"')
        writer.write((CHUNKED if next_request == "malformed body" else b"") + b"no such thing\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            heard += await reader.read()
        writer.close()
        await until(lambda: not upstream.running)
    assert heard.count(b"HTTP/1.1 4") == 0, "the refusal of the second request"


async def test_an_empty_piece_does_not_end_a_stream() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reply = AsgiReply(send)
        assert reply.exchange is not None  # or this shows nothing of the short way out
        await reply.start_stream(b"")
        for piece in (b"one", b"", b"two"):
            await reply.send(piece)
        await reply.end()

    async with guarded(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: g\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        chunks = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
    assert b"transfer-encoding: chunked" in head
    assert chunks == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
