"""What an OpenAI-compatible server may say, and what is understood."""

import asyncio
import email.utils
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from gateway.edge.wire import read_chat
from gateway.ledger.settle import Usage
from gateway.upstream.connection import AFTER_STREAM_S
from gateway.upstream.http import HttpClient, Statistics
from gateway.upstream.openai import OpenAIUpstream
from gateway.upstream.types import Answer, CallHeaders, Cause, ChatCall, StreamState, Target, UpstreamError
from routers.policy import Price
from routers.types import Endpoint
from tests.gateway.conftest import until
from tests.gateway.raw_server import Play, RawServer, in_pieces, raw_server, then_close

pytestmark = pytest.mark.anyio
PRICE = Price(input=1, cached_input=1, cache_write=1, output=1, reasoning=1)
TARGET = Target("m", "p", "wire/m", PRICE, 1000, 100, timeout_s=30, retries=0)


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()
    assert client.statistics() == Statistics(0, 0, 0, 0)


def upstream(client: HttpClient, server: RawServer) -> OpenAIUpstream:
    return OpenAIUpstream(client, "p", f"http://127.0.0.1:{server.port}/v1/", "sk-key")


def call(stream: bool = False, endpoint: Endpoint = "chat.completions") -> ChatCall:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]' + (b',"stream":true}' if stream else b"}")
    plain = read_chat(body, CallHeaders(""))
    fields = {name: getattr(plain, name) for name in plain.__struct_fields__} | {"endpoint": endpoint}
    return ChatCall(**fields)


def answer(body: bytes, *headers: bytes, status: int = 200, kind: bytes = b"application/json") -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"Content-Type: " + kind, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def asked(client: HttpClient, play: Play, stream: bool = False) -> UpstreamError:
    async with raw_server(play) as server:
        provider = upstream(client, server)
        with pytest.raises(UpstreamError) as caught:
            await (provider.stream(TARGET, call(stream=True)) if stream else provider.complete(TARGET, call()))
    return caught.value


def error_body(message: str = "no", code: str | None = None, kind: str = "invalid_request_error") -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


LONG = "This model's maximum context length is 4096 tokens, however you requested 5000 tokens."


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (429, error_body(), "rate_limit"),
        (429, b"<html>slow", "rate_limit"),
        (400, error_body(code="context_length_exceeded"), "context_length"),
        (400, error_body(LONG), "context_length"),
        (400, error_body("prompt is too long: 210000 tokens > 200000 maximum"), "context_length"),
        (413, error_body("too many tokens"), "context_length"),
        (422, error_body("Too Many Tokens in the input"), "context_length"),
        (400, msgspec.json.encode({"object": "error", "message": LONG, "code": 400}), "context_length"),
        (400, error_body(code="content_filter"), "content_filter"),
        (400, error_body(code="content_policy_violation"), "content_filter"),
        (403, error_body(kind="content_filter"), "content_filter"),
        (400, error_body(), "refused"),
        (404, error_body(LONG), "refused"),
        (400, b"nonsense", "refused"),
        (401, error_body(), "auth"),
        (403, error_body(), "auth"),
        (302, b"", "bad_answer"),
        (408, b"", "status"),
        (409, error_body(), "status"),
        (500, error_body(code="context_length_exceeded"), "status"),
        (502, b"<html>", "status"),
        (529, error_body("Overloaded", kind="overloaded_error"), "status"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_told_by_its_cause(
    client: HttpClient, status: int, body: bytes, cause: Cause, stream: bool
) -> None:
    error = await asked(client, answer(body, status=status), stream)
    assert (error.cause, error.status, error.may_be_billed) == (cause, status, False)
    assert error.retryable == (cause in ("rate_limit", "status", "bad_answer"))
    assert "sk-key" not in error.message


@pytest.mark.parametrize(
    ("headers", "retry_after_s", "should_retry"),
    [
        ([b"Retry-After: 7"], 7.0, None),
        ([b"retry-after-ms: 1500", b"Retry-After: 7"], 1.5, None),
        ([b"Retry-After: @100"], 100.0, None),
        ([b"Retry-After: soon"], None, None),
        ([b"X-Should-Retry: true"], None, True),
        ([b"x-should-retry: false", b"Retry-After: 1"], 1.0, False),
        ([b"x-should-retry: perhaps"], None, None),
    ],
)
async def test_when_to_come_back(
    client: HttpClient, headers: list[bytes], retry_after_s: float | None, should_retry: bool | None
) -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True).encode()
    headers = [header.replace(b"@100", date) for header in headers]
    error = await asked(client, answer(error_body(), *headers, status=429))
    assert error.should_retry is should_retry
    assert error.retryable is (should_retry is not False)
    if retry_after_s is None:
        assert error.retry_after_s is None
    else:
        assert error.retry_after_s == pytest.approx(retry_after_s, abs=60 if retry_after_s == 100 else 0)


@pytest.mark.parametrize(
    ("play", "cause", "words"),
    [
        (answer(b"<html>", kind=b"text/html; charset=utf-8"), "bad_answer", "text/html"),
        (answer(error_body("over quota")), "bad_answer", "over quota"),
        (answer(b"data: [DONE]\n\n", kind=b"text/event-stream"), "cut", "before its first event"),
        (answer(b"", kind=b"text/event-stream"), "cut", "before its first event"),
        (answer(b"data: {no\n\n", kind=b"text/event-stream"), "bad_answer", "no chat completion chunk"),
        (answer(b'data: {"error":{"message":"sorry"}}\n\n', kind=b"text/event-stream"), "cut", "sorry"),
    ],
)
async def test_a_200_that_is_no_stream(client: HttpClient, play: Play, cause: Cause, words: str) -> None:
    error = await asked(client, play, stream=True)
    assert (error.cause, error.may_be_billed) == (cause, True)
    assert words in error.message


@pytest.mark.parametrize(
    ("play", "cause"),
    [
        (then_close(b""), "cut"),
        (then_close(answer(b'{"x":1}')[:-2]), "cut"),
        (b"SSH-2.0\r\n", "bad_answer"),
        (answer(b"\x1f\x8b", b"Content-Encoding: gzip"), "bad_answer"),
        (answer(b"<html>"), "bad_answer"),
        (answer(b"[]"), "bad_answer"),
        (answer(error_body()), "bad_answer"),
    ],
)
async def test_a_200_that_is_no_answer_may_be_billed(client: HttpClient, play: Play, cause: Cause) -> None:
    error = await asked(client, play)
    assert (error.cause, error.may_be_billed, error.retryable) == (cause, True, True)


async def test_a_usage_that_cannot_be_read_costs_no_answer(client: HttpClient) -> None:
    for usage in (b'{"prompt_tokens":"?"}', b"7", b'{"prompt_tokens":1.5}'):
        body = b'{"choices":[],"usage":' + usage + b"}"
        async with raw_server(answer(body)) as server:
            assert await upstream(client, server).complete(TARGET, call()) == Answer(body, None, 1)


async def test_an_odd_detail_of_an_answers_usage_costs_no_count(client: HttpClient) -> None:
    for cached, expected in ((b"4.0", Usage(6, 4, output=5)), (b'"4"', Usage(7, 3, output=5))):
        body = (
            b'{"timings":{"cache_n":3},"usage":{"prompt_tokens":10,"completion_tokens":5.0,'
            b'"prompt_tokens_details":{"cached_tokens":%b}}}' % cached
        )
        async with raw_server(answer(body)) as server:
            assert (await upstream(client, server).complete(TARGET, call())).usage == expected


@pytest.mark.parametrize(
    ("choices", "size"),
    [
        ([{"message": {"content": "é", "reasoning": "abc"}, "logprobs": {"content": [1] * 99}}, {"text": "de"}], 7),
        ([{"message": {"tool_calls": [{"id": "x" * 99, "function": {"name": "f", "arguments": "{}"}}]}}], 3),
        ([{"message": {"content": None}}], 1),
        ([{}], 1),
        ([{"message": [1]}], 136),
    ],
)
async def test_an_answer_without_usage_is_estimated_by_its_words_alone(
    client: HttpClient, choices: Any, size: int
) -> None:
    body = msgspec.json.encode({"id": "x" * 99, "choices": choices})
    async with raw_server(answer(body)) as server:
        assert await upstream(client, server).complete(TARGET, call()) == Answer(body, None, size)


async def test_vectors_are_no_output(client: HttpClient) -> None:
    body = msgspec.json.encode({"data": [{"embedding": [0.125] * 999}]})
    async with raw_server(answer(body)) as server:
        embedding = call(endpoint="embeddings")
        found = await upstream(client, server).complete(TARGET, embedding)
    assert found.usage == Usage(input=-(-embedding.body_bytes // 3), estimated=True)


@pytest.mark.parametrize("endpoint", ["chat.completions", "completions", "embeddings"])
async def test_each_endpoint_has_its_path(client: HttpClient, endpoint: Endpoint) -> None:
    body = b'{"object":"list","data":[],"usage":{"prompt_tokens":3,"total_tokens":3}}'
    async with raw_server(answer(body)) as server:
        found = await upstream(client, server).complete(TARGET, call(endpoint=endpoint))
        assert found == Answer(body, Usage(input=3))
        (request,) = server.requests
    head, _, sent = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/" + endpoint.replace(".", "/").encode() + b" HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer sk-key\r\n" in head
    assert msgspec.json.decode(sent)["model"] == "wire/m"


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


async def streamed(client: HttpClient, server: RawServer) -> tuple[list[bytes], StreamState]:
    stream = await upstream(client, server).stream(TARGET, call(stream=True))
    try:
        return [event.data async for events in stream for event in events], stream.state
    finally:
        await stream.close()


@pytest.mark.parametrize(
    "data",
    [
        delta("a") + delta("", "stop") + USAGE + DONE,
        delta("a") + USAGE + DONE,
        delta("a") + USAGE + DONE + b"data: {not json\n\n",
        delta("a") + USAGE + DONE + delta("never"),
        delta("a") + delta("", "stop") + USAGE,
        delta("a") + delta("", "stop") + USAGE.rstrip(),
        b"\xef\xbb\xbf: hi\r\n\r\n" + (delta("a") + USAGE + DONE).replace(b"\n", b"\r\n"),
    ],
    ids=["usual", "no finish", "broken after", "more after", "no done", "no end", "bom and crlf"],
)
async def test_a_stream_is_whole_by_its_terminator_or_its_finish_reasons(client: HttpClient, data: bytes) -> None:
    pieces = [chunked(data[at : at + 37]) for at in range(0, len(data), 37)]
    async with raw_server(in_pieces(SSE, *pieces, b"0\r\n\r\n")) as server:
        for _ in range(2):
            _, state = await streamed(client, server)
            assert (state.done, state.usage, state.delivered_bytes) == (True, Usage(input=5, output=2), 1)


@pytest.mark.parametrize("tail", [b"0\r\n\r\n", b""], ids=["ended", "cut"])
async def test_a_stream_that_is_not_whole_is_an_error(client: HttpClient, tail: bytes) -> None:
    async with raw_server(then_close(SSE + chunked(delta("a")) + tail)) as server:
        with pytest.raises(UpstreamError) as caught:
            await streamed(client, server)
        assert (caught.value.cause, caught.value.may_be_billed) == ("cut", True)


async def test_a_streams_connection_serves_the_next_call(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.openai.LINGER_S", 60.0)
    async with raw_server(in_pieces(SSE, chunked(delta("a") + DONE), b"0\r\n\r\n", pause_s=0.02)) as server:
        for _ in range(3):
            await streamed(client, server)
            await until(lambda: client.statistics().idle == 1)
            await asyncio.sleep(2 * AFTER_STREAM_S)
        assert server.connections == 1


async def test_a_stream_that_is_left_is_closed_at_once(client: HttpClient) -> None:
    async with raw_server(in_pieces(SSE, *[chunked(delta("a"))] * 100, pause_s=0.02)) as server:
        stream = await upstream(client, server).stream(TARGET, call(stream=True))
        await stream.close()
        assert client.statistics() == Statistics(0, 0, 0, 0)
