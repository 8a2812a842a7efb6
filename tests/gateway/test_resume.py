"""A stream that breaks after its first byte and goes on elsewhere: one answer for its caller, each part billed."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.edge.wire import read_chat
from gateway.ledger.settle import Usage, cost_nanousd
from gateway.resume import Transcript, resumable
from gateway.upstream.breaker import Breaker
from gateway.upstream.types import CallHeaders, Event
from routers.policy import Breaker as BreakerRule
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio

POLICY = """
version: 1
providers:
  one: {{base_url: "{url}", timeout: 20s, retries: 0}}
  two: {{base_url: "{url}", timeout: 20s, retries: 0}}
{home}
models:
  main: {{provider: one, model: dear, context: 16000, max_output: 1000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, output: $10/Mtok}}}}
  next: {{provider: two, model: cheap, context: 16000, max_output: 1000, prefix: true,
         price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  last: {{provider: two, model: cheap, context: 16000, max_output: 1000, prefix: true, price: free}}
{local}
routes:
  - {{name: resumed, when: {{model: resumed}}, use: [main], on_failure: [next, last], on_stream_failure: resume}}
  - {{name: strict, when: {{model: strict}}, use: [main], on_failure: [next, last]}}
{routes}
{limits}
"""


def policy_for(upstream: FakeUpstream, **parts: str) -> str:
    return POLICY.format(url=upstream.url, **{"home": "", "local": "", "routes": "", "limits": "", **parts})


@pytest.fixture
async def gateway(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(policy_for(upstream), tmp_path / "home") as running_gateway:
        yield running_gateway


def chunks_of(raw: bytes) -> list[dict[str, Any]]:
    lines = [line for line in raw.decode().split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(raw: bytes) -> str:
    return "".join(c["delta"].get("content") or "" for chunk in chunks_of(raw) for c in chunk.get("choices", ()))


async def rest(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """What a model writes that takes the last message as the start of its answer."""
    *_, last = body["messages"]
    assert (last["role"], last["prefix"]) == ("assistant", True)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    begun = len(last["content"].split())
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": f" w{word}"} for word in range(begun, upstream.words)]
    choices: list[list[dict[str, Any]]] = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
    choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    frame = {"id": "chatcmpl-other", "object": "chat.completion.chunk", "created": 2, "model": body["model"]}
    usage = upstream.bill(body, upstream.words - begun)
    events: list[dict[str, Any]] = [{**frame, "choices": choice} for choice in choices]
    for event in [*events, {**frame, "choices": [], "usage": usage}]:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


WHOLE = " ".join(f"w{i}" for i in range(12))


@anyio
async def test_a_cut_stream_goes_on_where_it_broke(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.cut_stream, rest]
    body = ask(model="resumed", max_tokens=100, stream_options={"include_usage": True})
    status, headers, raw = await gateway.stream(body)
    assert (status, headers["x-leadline-model"]) == (200, "main")
    assert text_of(raw) == WHOLE
    assert raw.endswith(b"data: [DONE]\n\n")
    assert b": leadline-resumed\n\n" in raw
    chunks = chunks_of(raw)
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("chatcmpl-fake", 1)}
    assert sum("role" in c["delta"] for chunk in chunks for c in chunk["choices"]) == 1
    receipt = chunks[-1]["leadline"]
    assert (receipt["resumed"], receipt["attempts"], receipt["model"]) == (True, 2, "next")

    sent = json.loads(upstream.bodies[1])
    assert sent["messages"][:-1] == body["messages"]
    assert sent["messages"][-1] == {"role": "assistant", "content": "w0 w1 w2", "prefix": True}
    assert sent["max_tokens"] == 97, "what was said is of the same answer"

    (row,) = await gateway.rows()
    first, second = row["attempt_rows"]
    assert [(a["kind"], a["outcome"]) for a in (first, second)] == [("first", "cut"), ("resume", "ok")]
    assert first["cost_estimated"]
    assert first["output_tokens"] >= 3
    assert (second["cost_nanousd"], second["cost_estimated"]) == (upstream.truth[-1].nanousd, False)
    assert row["cost_nanousd"] == first["cost_nanousd"] + second["cost_nanousd"] == receipt["cost_nanousd"]
    assert (row["outcome"], row["model_served"], row["degraded"]) == ("ok", "next", "resumed")
    assert row["first_byte_us"] < row["duration_us"]
    assert row["overhead_us"] <= row["first_byte_us"]
    told = first["output_tokens"] + second["output_tokens"]
    assert chunks[-1]["usage"]["completion_tokens"] == told, "all that the caller has, not the rest alone"
    assert chunks[-1]["usage"]["prompt_tokens"] == first["input_tokens"], (
        "the words so far are no prompt of the caller's"
    )
    dearest = gateway.app.state.lifecycle.world.dearest(("main",))
    assert row["baseline_nanousd"] == cost_nanousd(dearest, Usage(first["input_tokens"], output=told))

    status, headers, raw = await gateway.stream(body)
    assert headers["x-leadline-cache"] == "miss", "an answer of two models is not kept"


@anyio
async def test_each_target_goes_on_once_and_then_the_stream_ends_with_an_error(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.faults = [fake.cut_stream, fake.cut_stream, fake.status(503)]
    _, _, raw = await gateway.stream(ask(model="resumed"))
    assert b"[DONE]" not in raw
    assert b'"code":"upstream_failed"' in raw.split(b"\n\n")[-3]
    (row,) = await gateway.rows()
    assert [(a["model"], a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [
        ("main", "first", "cut"), ("next", "resume", "cut"), ("last", "resume", "status"),
    ]  # fmt: skip
    assert row["outcome"] == "error"
    said = json.loads(upstream.bodies[2])["messages"][-1]["content"]
    assert said == "w0 w1 w2w0 w1 w2", "all that the caller has seen"


@anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"model": "strict"},
        {"model": "resumed", "n": 2},
        {"model": "resumed", "response_format": {"type": "json_object"}},
        {"model": "resumed", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
    ids=["route says error", "two choices", "a format", "tools"],
)
async def test_what_cannot_be_continued_ends_with_an_error(
    gateway: Gateway, upstream: FakeUpstream, fields: dict[str, Any]
) -> None:
    upstream.faults = [fake.cut_stream]
    _, _, raw = await gateway.stream(ask(**fields))
    assert b"[DONE]" not in raw
    assert b'data: {"error":{' in raw
    (row,) = await gateway.rows()
    assert (len(row["attempt_rows"]), row["outcome"], row["degraded"]) == (1, "error", None)
    assert len(upstream.bodies) == 1


@anyio
async def test_a_resumption_that_no_budget_holds_leaves_nothing_behind(upstream: FakeUpstream, tmp_path: Path) -> None:
    policy = policy_for(upstream, limits='limits: [{key: "*", budget: $0.0045/day}]').replace(
        "price: free", "price: {output: $10/Mtok, input: $2.50/Mtok}"
    )
    async with running(policy, tmp_path / "home") as gateway:
        lifecycle = gateway.app.state.lifecycle
        now = [1000.0]
        breaker = lifecycle.world.breakers["last"] = Breaker(BreakerRule(1, 1000, 1000), lambda: now[0])
        breaker.failed()
        now[0] += 1
        upstream.words = 400

        async def late_cut(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return await upstream.stream(request, body, cut_after=150)

        upstream.faults = [late_cut, fake.status(503)]
        _, _, raw = await gateway.stream(ask(model="resumed", max_tokens=100))
        assert b"[DONE]" not in raw
        (row,) = await gateway.rows()
        assert [a["model"] for a in row["attempt_rows"]] == ["main", "next"]
        assert breaker.reason() is None, "the probe was given back"
        assert lifecycle.budgets.all()[0].reserved_nanousd == 0


@anyio
async def test_who_is_left_alone_is_not_asked_to_go_on(gateway: Gateway, upstream: FakeUpstream) -> None:
    async def cut(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        for model in ("next", "last"):
            gateway.app.state.lifecycle.world.breakers[model].limited(30)
        return await fake.cut_stream(upstream, request, body)

    upstream.faults = [cut]
    _, _, raw = await gateway.stream(ask(model="resumed"))
    assert b'"code":"upstream_failed"' in raw
    (row,) = await gateway.rows()
    assert (len(upstream.bodies), row["outcome"], row["degraded"]) == (1, "error", None)


def test_only_one_plain_text_can_be_continued() -> None:
    def call(**fields: Any) -> bool:
        return resumable(read_chat(json.dumps(ask(stream=True, **fields)).encode(), CallHeaders(token="")))

    assert call()
    assert call(n=1, max_tokens=5, stop=["x"])
    assert not any(
        call(**fields) for fields in ({"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}})
    )


def test_a_continued_call_grows_by_the_words_alone() -> None:
    body = json.dumps(ask("x" * 5000, stream=True, max_completion_tokens=3)).encode()
    call = read_chat(body, CallHeaders(token=""))
    transcript = Transcript()
    for word in ("one ", "two ", "three ", "four "):
        transcript.note(Event(json.dumps({"id": "a", "choices": [{"index": 0, "delta": {"content": word}}]}).encode()))
    continued = transcript.continued(call)
    assert continued is not None
    assert continued.prefix == "one two three four "
    assert 0 < continued.body_bytes - call.body_bytes < 150
    assert json.loads(bytes(continued.fields["max_completion_tokens"])) == continued.sampling.max_tokens == 1
    assert "max_tokens" not in continued.fields
    assert bytes(call.fields["max_completion_tokens"]) == b"3"


def test_an_answer_that_its_caller_began_is_continued_behind_both() -> None:
    begun = {"role": "assistant", "content": "one two"}
    asked = {**ask(stream=True), "messages": [*ask()["messages"], begun], "continue_final_message": True}
    call = read_chat(json.dumps(asked).encode(), CallHeaders(token=""))
    transcript = Transcript()
    transcript.note(Event(b'{"id":"a","choices":[{"index":0,"delta":{"content":" three"}}]}'))
    continued = transcript.continued(call)
    assert continued is not None
    assert continued.prefix == "one two three"
    assert json.loads(bytes(continued.fields["messages"])) == ask()["messages"]
    assert "continue_final_message" not in continued.fields


def test_an_answer_in_parts_is_not_gone_on_with() -> None:
    """Nor one of which any chunk could not be read: the rest would be written to words that are not all."""
    call = read_chat(json.dumps(ask()).encode(), CallHeaders(token=""))
    for odd in ({"content": [{"type": "text", "text": " two"}]}, {"content": {"text": " two"}}, "two"):
        transcript = Transcript()
        for delta in ({"content": "one"}, odd, {"content": " three"}):
            transcript.note(Event(json.dumps({"id": "a", "choices": [{"index": 0, "delta": delta}]}).encode()))
        assert transcript.continued(call) is None


HOME = "  home: {engine: embedded}"
LOCAL = "  local: {provider: home, model: bundled/base, context: 1024, price: free}"
ROUTES = "  - {name: saved, when: {model: saved}, use: [main], on_failure: [local], on_stream_failure: resume}"


@anyio
@pytest.mark.engine
async def test_the_local_engine_goes_on_with_a_remote_stream(upstream: FakeUpstream, tmp_path: Path) -> None:
    async def breaks(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        frame = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": "dear"}
        for delta in ({"role": "assistant", "content": "The"}, {"content": " answer"}):
            choices = [{"index": 0, "delta": delta, "finish_reason": None}]
            await response.write(f"data: {json.dumps({**frame, 'choices': choices})}\n\n".encode())
        assert request.transport is not None
        request.transport.close()
        return response

    policy = policy_for(upstream, home=HOME, local=LOCAL, routes=ROUTES)
    async with running(policy, tmp_path / "home") as gateway:
        assert gateway.app.engine is not None
        await gateway.app.engine.ready.wait()
        upstream.faults = [breaks]
        body = ask("What is 2 + 3?", model="saved", temperature=0, stream_options={"include_usage": True})
        _, _, raw = await gateway.stream(body)
        (row,) = await gateway.rows()
    assert re.fullmatch(r"The answer is \d+\.", text_of(raw))
    assert raw.endswith(b"data: [DONE]\n\n")
    chunks = chunks_of(raw)
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-fake"}
    assert chunks[-1]["leadline"]["resumed"] is True
    assert [(a["model"], a["kind"]) for a in row["attempt_rows"]] == [("main", "first"), ("local", "resume")]
    assert row["degraded"] == "resumed"
