"""Bodies made to break a parser, a memory limit or a ledger (T10): a clear 4xx, never a 5xx, nothing sent on."""

import asyncio
import contextlib
import gzip
import json
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from gateway.edge.surrogates import half_character_in
from gateway.edge.wire import MAX_MESSAGES
from tests.edge.conftest import post
from tests.edge.provider import Provider
from tests.edge.raw import responses_of
from tests.edge.test_slow_clients import connect
from tests.gateway.conftest import Gateway

anyio = pytest.mark.anyio
MESSAGES = b'"messages":[{"role":"user","content":"x"}]'
CHAT = b'{"model":"chat",' + MESSAGES
ZIPPED = gzip.compress(b"x" * (8 << 20))


def chat(more: bytes) -> bytes:
    return CHAT + b"," + more + b"}"


def deep(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + closing * depth


CASES: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \r\n\t ",
    "null": b"null",
    "number": b"1",
    "string": b'"x"',
    "array": b"[" + CHAT + b"}]",
    "cut": CHAT,
    "cut-in-a-string": b'{"model":"ch',
    "two-documents": CHAT + b"}" + CHAT + b"}",
    "comma-at-end": CHAT + b",}",
    "comment": CHAT + b"/* */}",
    "single-quotes": b"{'model':'chat'}",
    "byte-order-mark": b"\xef\xbb\xbf" + CHAT + b"}",
    "utf-16": (CHAT + b"}").decode().encode("utf-16"),
    "utf-32": (CHAT + b"}").decode().encode("utf-32"),
    "nul": CHAT + b"}\x00",
    "control-in-a-string": b'{"model":"chat","messages":[{"role":"user","content":"a\x01b"}]}',
    "invalid-utf-8-read": b'{"model":"chat","messages":[{"role":"user","content":"\xff\xfe"}]}',
    "invalid-utf-8-unread": chat(b'"unread":"\xc3\x28"'),
    "overlong-utf-8": chat(b'"unread":"\xc0\xaf"'),
    "surrogates-in-utf-8": chat(b'"unread":"\xed\xa0\x80"'),
    "utf-8-beyond-unicode": chat(b'"unread":"\xf5\x80\x80\x80"'),
    "lone-surrogate-model": b'{"model":"\\ud800",' + MESSAGES + b"}",
    "lone-surrogate-content": b'{"model":"chat","messages":[{"role":"user","content":"\\udfff"}]}',
    "nan": chat(b'"temperature":NaN'),
    "infinity": chat(b'"temperature":-Infinity'),
    "1e999": chat(b'"temperature":1e999'),
    "1e999-unread": chat(b'"unread":NaN'),
    "400-digits": chat(b'"n":' + b"9" * 400),
    "5000-digits": chat(b'"max_tokens":' + b"9" * 5000),
    "hex-number": chat(b'"n":0x10'),
    "leading-zero": chat(b'"n":01'),
    "float-count": chat(b'"n":1.5'),
    "bool-count": chat(b'"n":true'),
    "nested-100000-arrays": chat(b'"unread":' + deep(100_000)),
    "nested-100000-objects": chat(b'"unread":' + deep(100_000, b'{"a":', b"}").replace(b":}", b":1}")),
    "nested-100000-content": b'{"model":"chat","messages":[{"role":"user","content":' + deep(100_000) + b"}]}",
    "open-1000000-arrays": b"[" * 1_000_000,
    "500000-messages": b'{"model":"chat","messages":[' + b",".join([b'{"role":"u"}'] * (5 * MAX_MESSAGES)) + b"]}",
    "million-character-model": b'{"model":"' + b"m" * 1_000_000 + b'",' + MESSAGES + b"}",
    "model-list": b'{"model":["chat"],' + MESSAGES + b"}",
    "model-object": b'{"model":{"$ne":null},' + MESSAGES + b"}",
    "messages-object": b'{"model":"chat","messages":{"0":{"role":"user"}}}',
    "messages-null": b'{"model":"chat","messages":null}',
    "message-null": b'{"model":"chat","messages":[null]}',
    "role-number": b'{"model":"chat","messages":[{"role":1,"content":"x"}]}',
    "content-number": b'{"model":"chat","messages":[{"role":"user","content":7}]}',
    "part-without-type": b'{"model":"chat","messages":[{"role":"user","content":[{"text":"x"}]}]}',
    "base-url": chat(b'"base_url":"http://127.0.0.1:1/"'),
    "form": b"model=chat&messages=x",
    "xml": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix.",
    "gzip-unsaid": ZIPPED,
}


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 40


@anyio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
async def test_a_hostile_body_is_a_clear_refusal(edge: Gateway, provider: Provider, path: str) -> None:
    wrong = []
    for name, body in CASES.items():
        status, headers, answer = await post(edge, path, body)
        error = answer["error"]
        if status != 400 or not 10 < len(error["message"]) < 400 or not headers["x-request-id"]:
            wrong.append((name, status, answer))
    assert wrong == []
    assert provider.bodies == []
    assert await edge.rows() == [], "what was not admitted has no row"
    honest = {"model": "chat", "messages": [{"role": "user", "content": "x"}]}
    assert (await post(edge, "/v1/chat/completions", honest))[0] == 200


@anyio
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", b'{"model":"chat","messages":[{"role":"user","content":"ab\\udfff"}]}',
         "messages[0].content"),
        ("/v1/chat/completions", chat(b'"metadata":{"a":["\\ud800"]}'), "metadata.a[0]"),
        ("/v1/chat/completions", b'{"model":"\\uD83D","messages":[]}', "model"),
        ("/v1/chat/completions", chat(b'"x\\ud83d":1'), "x\\ud83d"),
        ("/v1/completions", b'{"model":"chat","prompt":"\\ud83d\\ud83d\\ude00"}', "prompt"),
        ("/v1/embeddings", b'{"model":"chat","input":["a","\\udc00"]}', "input[1]"),
        ("/leadline/v1/explain", b'{"messages":[{"role":"user","content":[{"type":"text","text":"\\ud800"}]}]}',
         "messages[0].content[0].text"),
        ("/leadline/v1/admin/keys", b'{"name":"\\ud800"}', "name"),
    ],
)  # fmt: skip
async def test_half_a_character_is_refused_by_its_place(
    edge: Gateway, provider: Provider, path: str, body: bytes, param: str
) -> None:
    status, _, answer = await post(edge, path, body, **{"Content-Type": "application/json"})
    error = answer["error"]
    assert (status, error["param"]) == (400, param)
    assert re.match(
        re.escape(param) + r": \\ud[89a-f]\w\w at character \d+ is half of a surrogate pair", error["message"]
    )
    assert "send both halves" in error["message"]
    assert provider.bodies == []


@anyio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/leadline/v1/explain"])
async def test_half_a_character_in_much_is_refused_in_little_memory(edge: Gateway, path: str) -> None:
    """To find its place takes objects and paths for all that stands before it: 120 times the body's memory."""
    much = chat(b'"unread":[' + b"1," * 500_000 + b'"\\ud800"]')
    tracemalloc.start()
    try:
        assert half_character_in(much) is not None
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < len(much)
    assert half_character_in(chat(b'"unread":[' + b"1," * 500_000 + b'"\\ud83d\\ude00"]')) is None
    status, _, answer = await post(edge, path, much, **{"Content-Type": "application/json"})
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert "half of a surrogate pair" in answer["error"]["message"]


@anyio
@pytest.mark.parametrize(
    ("encoding", "body"),
    [("gzip", ZIPPED), ("deflate", zlib.compress(b"x" * (8 << 20))), ("br", b"\x8b"), ("zstd, gzip", b"x")],
)
async def test_a_compressed_body_is_refused_by_its_header(
    edge: Gateway, provider: Provider, encoding: str, body: bytes
) -> None:
    status, _, answer = await post(edge, "/v1/chat/completions", body, **{"Content-Encoding": encoding})
    assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")
    assert provider.bodies == []


@anyio
async def test_a_field_that_stands_twice_has_one_meaning(edge: Gateway, provider: Provider) -> None:
    doubled = (
        b'{"model":"nope","m\\u006fdel":"chat","n":7,"messages":[{"role":"user","content":"first"}],"max_tokens":999,'
        b'"messages":[{"role":"user","content":"last"}],"n":1,"max_tokens":5,"stream":true,"stream":false}'
    )
    status, headers, _ = await post(edge, "/v1/chat/completions", doubled)
    assert (status, headers["x-leadline-model"]) == (200, "chat")
    pairs: list[tuple[str, Any]] = json.loads(provider.bodies[0], object_pairs_hook=list)
    assert len(pairs) == len(dict(pairs)), "each field goes out once"
    sent = json.loads(provider.bodies[0])
    assert (sent["n"], sent["max_tokens"], sent["stream"]) == (1, 5, False)
    assert sent["messages"][0]["content"] == "last"


def peak_rss() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@anyio
@pytest.mark.parametrize("framing", ["declared", "chunked"])
async def test_a_body_without_end_is_cut_off_and_takes_no_memory(
    edge: Gateway, provider: Provider, framing: str
) -> None:
    """1 TiB is promised; the client sends until it is stopped."""
    limit = edge.app.settings.max_body_bytes
    before = peak_rss()
    reader, writer = await connect(edge)
    length = b"content-length: 1099511627776" if framing == "declared" else b"transfer-encoding: chunked"
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + edge.key.encode() + b"\r\n"
        + length + b"\r\n\r\n"
    )  # fmt: skip
    piece = b" " * (1 << 16)
    sent = 0
    hearing = asyncio.create_task(reader.read(1 << 16))
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(piece if framing == "declared" else b"10000\r\n" + piece + b"\r\n")
                await writer.drain()
                sent += len(piece)
                await asyncio.sleep(0)
    (response,) = responses_of(await hearing)
    writer.close()
    assert (response.status, json.loads(response.body)["error"]["code"]) == (413, "body_too_large")
    assert sent < 1 << 40, "the connection is closed; the rest is not waited for"
    assert peak_rss() - before <= 3 * limit
    assert await edge.rows() == []


@anyio
async def test_the_other_paths_do_not_break_either(edge: Gateway) -> None:
    for name, body in CASES.items():
        status, _, answer = await post(edge, "/leadline/v1/explain", body, **{"Content-Type": "application/json"})
        assert status == 200 if "decision" in answer else 400 <= status < 500, name
