"""The data plane as clients see it."""

import json
from typing import Any

import msgspec
import openai
import pytest
from aiohttp import web

from tests.gateway.conftest import Gateway, ask
from tests.gateway.fake_upstream import FakeUpstream, Fault
from tests.serving import begin_events, event

pytestmark = pytest.mark.anyio


async def test_plain_answer_passes_through_with_its_receipt_in_headers(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    status, headers, body = await gateway.chat(ask())
    assert status == 200
    assert body["vendor_field"] == {"kept": True}
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-leadline-decision"] == "dec" + headers["x-request-id"][3:]
    assert headers["x-leadline-model"] == "cheap"
    assert headers["x-leadline-cache"] == "miss"
    assert float(headers["x-leadline-overhead-ms"]) > 0
    assert int(headers["x-leadline-cost-nanousd"]) == upstream.truth[0].nanousd


async def test_the_callers_bytes_reach_the_provider_unchanged_but_for_the_model(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    messages = b'[ {"role":"user",  "content":"caf\\u00e9 \xf0\x9f\x8c\x8a" , "x":1.50 } ]'
    tools = b'[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]'
    body = b'{"tools": ' + tools + b', "model":"auto", "messages":' + messages + b', "unknown_field": [1, 2.0]}'
    status, _, _ = await gateway.chat(body)
    assert status == 200
    sent = msgspec.json.decode(upstream.bodies[0], type=dict[str, msgspec.Raw])
    assert bytes(sent["messages"]) == messages
    assert bytes(sent["tools"]) == tools
    assert bytes(sent["unknown_field"]) == b"[1, 2.0]"
    assert bytes(sent["model"]) == b'"cheap"'


async def test_nothing_of_the_callers_headers_reaches_the_provider(gateway: Gateway, upstream: FakeUpstream) -> None:
    await gateway.chat(ask(), **{"X-Secret": "canary", "Cookie": "canary=1", "X-Leadline-Tags": "a"})
    assert "canary" not in str(upstream.requests[0])
    assert gateway.key not in str(upstream.requests[0])


async def test_the_openai_client_works_by_its_base_url_alone(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        plain = await client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}])
        assert plain.choices[0].message.content == " ".join(f"w{i}" for i in range(12))
        stream = await client.chat.completions.create(
            model="cheap",
            messages=[{"role": "user", "content": "hi again"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage, receipt = "", None, None
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if chunk.usage:
                usage, receipt = chunk.usage, chunk.model_extra
        assert text == plain.choices[0].message.content
        assert usage is not None
        assert receipt is not None
        assert receipt["leadline"]["model"] == "cheap"
        models = [model.id async for model in client.models.list()]
        assert models[:3] == ["auto", "fragile", "uncached"]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"


async def test_usage_is_shown_to_those_who_asked_only(gateway: Gateway) -> None:
    _, _, silent = await gateway.stream(ask())
    assert b'"usage"' not in silent
    assert silent.endswith(b"data: [DONE]\n\n")
    _, _, asked = await gateway.stream(ask("other", stream_options={"include_usage": True}))
    assert asked.count(b'"usage"') == 1


def usage_in_the_last_choice(*after: bytes) -> Fault:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await begin_events(request)
        frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        await response.write(event({**frame, "choices": [{"index": 0, "delta": {"content": "x"}}]}))
        end = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        await response.write(event({**frame, "choices": end, "usage": upstream.bill(body, 1)}) + b"".join(after))
        return response

    return play


@pytest.mark.parametrize("after", [[b"data: [DONE]\n\n"], [], [b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"]])
async def test_usage_beside_the_last_choice_is_told_with_its_receipt(
    gateway: Gateway, upstream: FakeUpstream, after: list[bytes]
) -> None:
    upstream.faults = [usage_in_the_last_choice(*after)] * 2
    _, _, raw = await gateway.stream(ask(stream_options={"include_usage": True}))
    last = json.loads([line for line in raw.split(b"\n") if line.startswith(b"data: {")][-1][6:])
    bill = upstream.truth[0]
    assert last["choices"] == []
    assert last["leadline"]["cost_nanousd"] == bill.nanousd
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (bill.prompt_tokens, 1)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == bill.cached_tokens
    _, _, raw = await gateway.stream(ask("other"))
    assert b'"leadline"' not in raw


async def test_the_callers_other_stream_options_reach_the_provider(gateway: Gateway, upstream: FakeUpstream) -> None:
    for given, sent in (
        ({"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
        ({"include_usage": False, "x": [1]}, {"include_usage": True, "x": [1]}),
        ({"include_usage": True}, {"include_usage": True}),
        ({}, {"include_usage": True}),
        (None, {"include_usage": True}),
    ):
        await gateway.stream(ask(str(given), stream_options=given))
        assert json.loads(upstream.bodies[-1])["stream_options"] == sent


async def test_a_streams_cost_is_in_its_last_events(gateway: Gateway, upstream: FakeUpstream) -> None:
    _, headers, raw = await gateway.stream(ask())
    assert headers["x-leadline-cost-nanousd"] == "in-last-event"
    assert f": leadline-cost-nanousd {upstream.truth[0].nanousd}\n".encode() in raw


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_stop_and_tools_pass_through(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    body = ask(n=2, stop=["x"], tools=tools, tool_choice="auto", logprobs=True, top_logprobs=2)
    if stream:
        _, _, raw = await gateway.stream(body)
        assert b'"index": 1' in raw
    else:
        _, _, answer = await gateway.chat(body)
        assert len(answer["choices"]) == 2
    sent = json.loads(upstream.bodies[0])
    assert (sent["n"], sent["stop"], sent["tools"], sent["top_logprobs"]) == (2, ["x"], tools, 2)


async def test_health_metrics_and_models(gateway: Gateway) -> None:
    await gateway.chat(ask())
    async with gateway.session.get(f"{gateway.url}/health/liveness") as response:
        assert response.status == 200
        assert response.headers["x-request-id"].startswith("req_")
    async with gateway.session.get(f"{gateway.url}/health/readiness") as response:
        assert (await response.json())["status"] == "ready"
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        text = await response.text()
        assert 'leadline_requests_total{cache="miss",model="cheap",outcome="ok",route="named"} 1.0' in text
        assert gateway.key not in text
    async with gateway.session.head(f"{gateway.url}/health/readiness") as response:
        assert (response.status, await response.read()) == (200, b"")
    async with gateway.session.delete(f"{gateway.url}/metrics") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")
        assert (await response.json())["error"]["code"] == "method_not_allowed"
    assert gateway.app._web is None, "what machines ask all the time needs no web framework"
    async with gateway.session.get(f"{gateway.url}/v1/models") as response:
        assert response.status == 401
        assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_explain_decides_and_runs_nothing(gateway: Gateway, upstream: FakeUpstream) -> None:
    async with gateway.session.post(
        f"{gateway.url}/leadline/v1/explain",
        json={"messages": [{"role": "user", "content": "hi"}]},
        headers=gateway.headers(),
    ) as response:
        told = await response.json()
    assert told["decision"]["plan"]["model"] == "cheap"
    assert {c["model"]: bool(c["rejected"]) for c in told["decision"]["candidates"]} == {"cheap": False, "dear": False}
    assert upstream.bodies == []
    assert await gateway.rows() == []


async def test_explain_states_a_worst_case_that_holds(gateway: Gateway) -> None:
    """Of the whole body: more tokens, choices and tools count before anything is sent."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    more: dict[str, object] = {"max_tokens": 50}
    bounds = []
    for addition in ({}, {"max_tokens": 200}, {"n": 3}, {"tools": [tool] * 20}):
        more |= addition
        url, body = f"{gateway.url}/leadline/v1/explain", ask("Say hello.", model="dear", **more)
        async with gateway.session.post(url, json=body, headers=gateway.headers()) as response:
            bound = (await response.json())["decision"]["worst_case_nanousd"]
        _, headers, _ = await gateway.chat(body)
        assert 0 < int(headers["x-leadline-cost-nanousd"]) <= bound
        bounds.append(bound)
    assert bounds == sorted(set(bounds)), "each addition can cost more"


async def test_a_receipt_is_for_its_own_tenant(gateway: Gateway) -> None:
    _, headers, _ = await gateway.chat(ask())
    keys = gateway.app.state.lifecycle.keys
    url = f"{gateway.url}/leadline/v1/requests/{headers['x-request-id']}"
    async with gateway.session.get(url, headers=gateway.headers()) as response:
        receipt = await response.json()
        assert receipt["model_served"] == "cheap"
        assert receipt["decision"]["route"] == "named"
        assert len(receipt["attempt_rows"]) == 1
    other = keys.create("other", tenant="elsewhere")
    async with gateway.session.get(url, headers={"Authorization": f"Bearer {other}"}) as response:
        assert response.status == 404
