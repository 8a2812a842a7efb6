"""Bugs that a review found, each with the scenario that showed it."""

import asyncio
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.admission.budgets import Budgets
from gateway.admission.keys import PepperError, load_pepper
from gateway.admission.limits import BudgetLimit
from gateway.edge.wire import read_chat
from gateway.errors import BudgetExceeded, Unavailable
from gateway.ledger import report
from gateway.ledger.journal import Journal
from gateway.ledger.settle import Usage, estimated_usage
from gateway.ledger.store import LedgerStore, connect
from gateway.upstream.gather import gather, replay
from gateway.upstream.types import CallHeaders
from tests.gateway.conftest import Gateway, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream, Fault
from tests.gateway.test_engine import POLICY as ENGINE_POLICY
from tests.gateway.test_engine import ask as ask_local
from tests.gateway.test_engine import home as home  # the fixture
from tests.gateway.test_ledger import a_request

anyio = pytest.mark.anyio


def text_only(content: str) -> bool:
    body = f'{{"model":"m","messages":[{{"role":"user","content":{content}}}]}}'.encode()
    return read_chat(body, CallHeaders("")).text_only


def test_only_known_text_is_bounded_by_its_bytes() -> None:
    assert text_only('"x"')
    assert text_only("null")
    assert text_only('[{"type":"text","text":"x"}]')
    for kind in ("image_url", "image\\u005furl", "video_url", "input_file", "anything"):
        assert not text_only(f'[{{"type":"text","text":"x"}},{{"type":"{kind}"}}]')


def test_the_larger_of_two_caps_is_reserved() -> None:
    body = b'{"model":"m","max_tokens":9000,"max_completion_tokens":1,"messages":[{"role":"user","content":"x"}]}'
    assert read_chat(body, CallHeaders("")).sampling.max_tokens == 9000


def test_an_estimate_stays_within_the_context() -> None:
    usage = estimated_usage(body_bytes=4 << 20, context=128_000, delivered_bytes=30, delivered_deltas=4)
    assert usage == Usage(input=128_000, output=10, estimated=True)


@anyio
async def test_a_budget_in_use_is_never_loaded_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.admission.budgets.MAX_LOADED", 10)

    async def spent_since(scope: str, start_ms: int) -> int:
        return 0

    budgets = Budgets(spent_since)
    limit = BudgetLimit("key:k", "total", 100, "key:k")
    held_by_one_request = await budgets.find([limit], 0, "req_1")
    for i in range(50):
        await budgets.find([BudgetLimit(f"scope:k:{i}", "total", 1, f"run:{i}")], 0, f"req_{i}")
    await held_by_one_request.reserve(100)
    again = await budgets.find([limit], 0, "req_2")
    assert again.budgets[0] is held_by_one_request.budgets[0]
    with pytest.raises(BudgetExceeded):
        await again.reserve(1)
    assert len(budgets.all()) <= 12


@anyio
async def test_two_rates_on_one_key_are_two_limits(start_gateway: StartGateway) -> None:
    async with start_gateway(
        'limits: [{key: "*", rate: 10/s}, {key: first, rate: 20/s}, {key: first, rate: 2/h}]'
    ) as g:
        statuses = [(await g.chat(ask(f"{i}")))[0] for i in range(3)]
    assert statuses == [200, 200, 429]


def usage_of(prompt: int) -> Fault:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        answer = json.loads((await upstream.plain(body)).text or "")
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": 1}
        return web.json_response(answer)

    return play


@anyio
@pytest.mark.parametrize("tokens", [2**56, 2**65])
async def test_an_absurd_count_is_not_believed_and_stops_nothing(
    gateway: Gateway, upstream: FakeUpstream, tokens: int
) -> None:
    upstream.faults = [usage_of(tokens)]
    assert (await gateway.chat(ask()))[0] in (200, 502)
    assert (await gateway.chat(ask("next")))[0] == 200
    after, absurd = await gateway.rows()
    assert absurd["cost_estimated"]
    assert not after["cost_estimated"]


@anyio
async def test_a_row_that_sql_refuses_does_not_hold_up_the_rest(tmp_path: Path, database_url: str) -> None:
    engine = connect(database_url)
    store = LedgerStore(engine, Journal(tmp_path / "journal"))
    store.start()
    for number, cost in enumerate((1, 2**70, 2)):
        request = a_request(number)
        store.journal.opened(request)
        request.cost_nanousd = cost
        store.close_request(request, [])
    await store.flush(timeout_s=20)
    assert report.summary(engine, since_ms=0)["cost_nanousd"] == 3
    await store.stop()
    engine.dispose()


@anyio
async def test_a_database_that_is_away_is_said_so_not_waited_for(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE request RENAME TO elsewhere")
    store = LedgerStore(engine, Journal(tmp_path / "journal"))
    store.start()
    request = a_request(1)
    store.journal.opened(request)
    store.close_request(request, [])
    with pytest.raises(Unavailable):
        await store.flush(timeout_s=0.2)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO request")
    await store.flush(timeout_s=20)
    assert report.summary(engine, since_ms=0)["requests"] == 1
    await store.stop()
    engine.dispose()


@anyio
async def test_what_the_journal_refuses_does_not_go_out(
    gateway: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(attempt: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.app.state.lifecycle.ledger.journal, "dispatched", full)
        status, _, body = await gateway.chat(ask())
    assert (status, body["error"]["code"]) == (503, "unavailable")
    assert upstream.bodies == []
    (row,) = await gateway.rows()
    assert (row["cost_nanousd"], row["attempts"]) == (0, 0)


@anyio
async def test_leaving_while_the_stream_is_closed_changes_no_bill(
    gateway: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.upstream.openai import OpenAIStream

    closing = asyncio.Event()
    close = OpenAIStream.close

    async def slow_close(self: OpenAIStream) -> None:
        closing.set()
        await asyncio.sleep(0.5)
        await close(self)

    monkeypatch.setattr(OpenAIStream, "close", slow_close)
    async with gateway.session.post(
        f"{gateway.url}/v1/chat/completions", json=ask(stream=True), headers=gateway.headers()
    ) as response:
        await closing.wait()
        response.close()
    await until(lambda: gateway.app.state.lifecycle.metrics.in_flight.value == 0)
    (row,) = await gateway.rows()
    assert (row["cost_nanousd"], row["cost_estimated"]) == (upstream.truth[0].nanousd, False)


def answer_with(body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> Fault:
    async def play(upstream: FakeUpstream, request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": kind, **headers})
        await response.prepare(request)
        for at in (slice(0, 20), slice(20, None)):
            await response.write(body[at])
            await asyncio.sleep(0.02)
        return response

    return play


@anyio
async def test_a_refusal_that_comes_in_pieces_keeps_its_words(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [answer_with(b'{"error":{"message":"that is wrong","code":"odd"}}', status=400)]
    status, _, body = await gateway.chat(ask())
    assert (status, body["error"]["message"], body["error"]["code"]) == (400, "that is wrong", "odd")


@anyio
async def test_bytes_that_are_no_utf8_are_the_upstreams_fault(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [answer_with('{"error":{"message":"déjà"}}'.encode("latin-1"), status=400)]
    assert (await gateway.chat(ask()))[0] == 400
    broken = b'data: {"choices":[{"index":0,"delta":{"content":"\xc3"}}]}\n\n'
    upstream.faults = [answer_with(broken, kind="text/event-stream")]
    status, headers, raw = await gateway.stream(ask("again"))
    assert (status, headers["x-leadline-attempts"]) == (200, "2")
    assert raw.endswith(b"data: [DONE]\n\n")
    rows = await gateway.rows()
    assert rows[1]["cost_nanousd"] == 0


@anyio
async def test_a_retry_after_that_is_no_number_is_not_read(gateway: Gateway, upstream: FakeUpstream) -> None:
    for value in ("inf", "nan", "9" * 400, "soon"):
        upstream.faults = [answer_with(b'{"error":"busy"}', status=429, **{"retry-after-ms": value})]
        assert (await gateway.chat(ask(value)))[0] == 200


@anyio
async def test_an_event_of_several_lines_stays_one(gateway: Gateway, upstream: FakeUpstream) -> None:
    stream = (
        b'data: {"choices":\ndata: [{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    upstream.faults = [answer_with(stream, kind="text/event-stream")]
    _, _, raw = await gateway.stream(ask())
    assert b'data: {"choices":\ndata: [{"index":0' in raw


def chunk(**delta: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode()


def test_what_cannot_be_put_together_is_not_kept() -> None:
    whole = gather([chunk(reasoning="think "), chunk(reasoning="hard"), chunk(content="x")])
    assert whole is not None
    assert json.loads(whole)["choices"][0]["message"]["reasoning"] == "think hard"
    assert gather([chunk(function_call={"name": "f"}), chunk(function_call={"arguments": "{}"})]) is None
    assert gather([chunk(tool_calls=[{"index": 10**9}])]) is None
    good = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1}}
    for stream in (False, True):
        assert replay(json.dumps(good).encode(), stream=stream) is not None
        for bad in ({**good, "usage": {}}, {**good, "usage": None}):
            assert replay(json.dumps(bad).encode(), stream=stream) is None
    for bad in ({**good, "choices": [{}]}, {"usage": good["usage"]}):
        assert replay(json.dumps(bad).encode(), stream=True) is None


@anyio
async def test_a_huge_body_is_refused_beside_the_data_plane_too(gateway: Gateway) -> None:
    url, body = f"{gateway.url}/leadline/v1/explain", io.BytesIO(b"x" * (2 << 20))
    async with gateway.session.post(url, data=body) as response:
        assert response.status == 413


@anyio
async def test_explain_refuses_what_is_no_character(gateway: Gateway) -> None:
    async with gateway.session.post(
        f"{gateway.url}/leadline/v1/explain",
        data=b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        headers=gateway.headers(**{"Content-Type": "application/json"}),
    ) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "messages[0].content"


def test_a_damaged_pepper_is_not_used(tmp_path: Path) -> None:
    assert load_pepper(tmp_path) == load_pepper(tmp_path)
    (tmp_path / "pepper").write_bytes(b"")
    with pytest.raises(PepperError, match="0 bytes"):
        load_pepper(tmp_path)


def test_a_key_is_not_in_any_representation() -> None:
    assert "canary" not in repr(CallHeaders("sk-ll-canary"))


assert ENGINE_POLICY  # the fixture `home` starts a gateway with it


@anyio
@pytest.mark.engine
async def test_an_engine_that_is_told_to_stop_ends_no_answer_as_a_success(home: Gateway) -> None:
    engine = home.app.engine
    assert engine is not None
    assert engine.pid is not None
    bodies = [ask_local(f"What is {i} + 8 - 7 + 6 - 5 + 4?", n=2) for i in range(12)]
    asking = [asyncio.create_task(home.chat(body)) for body in bodies]
    await asyncio.sleep(0.4)
    os.kill(engine.pid, signal.SIGTERM)
    for status, _, body in await asyncio.gather(*asking):
        assert status == 503 or all("answer is" in choice["message"]["content"] for choice in body["choices"])


@anyio
@pytest.mark.engine
async def test_a_conversation_far_too_long_holds_up_nobody(home: Gateway, upstream: FakeUpstream) -> None:
    status, headers, _ = await home.chat(ask_local("a " * 400_000, model="auto"))
    assert status == 400, "it fits neither model"
    assert headers["x-leadline-attempts"] == "0"
    engine = home.app.engine
    assert engine is not None
    assert engine.client is not None
    result = await engine.client.probe(json.dumps([{"role": "user", "content": "a " * 100_000}]).encode())
    assert result.input_tokens == {}, "not counted, as it cannot fit"
    assert result.p_success


@anyio
@pytest.mark.engine
async def test_what_the_local_model_cannot_do_goes_elsewhere(home: Gateway) -> None:
    function: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
    for more in ({"functions": [function]}, {"tools": [{"type": "function", "function": function}]}):
        _, headers, _ = await home.chat(ask_local("What is 2 + 3?", model="auto", **more))
        assert headers["x-leadline-model"] == "cheap", more
        status, _, body = await home.chat(ask_local("What is 2 + 3?", **more))
        assert (status, body["error"]["code"]) == (400, "invalid_request")
    _, headers, _ = await home.chat(ask_local("What is 2 + 3?", model="auto", response_format={"type": "text"}))
    assert headers["x-leadline-model"] == "local"


@anyio
@pytest.mark.engine
async def test_a_lost_link_to_a_living_engine_is_mended(home: Gateway) -> None:
    engine = home.app.engine
    assert engine is not None
    client, process = engine.client, engine.pid
    assert client is not None
    assert client._writer is not None
    writer = client._writer
    writer.transport.abort()
    await until(lambda: engine.client is not None and engine.client._writer is not writer)
    assert engine.pid == process, "no reason to start another"
    assert (await home.chat(ask_local("What is 2 + 3?")))[0] == 200


@anyio
@pytest.mark.engine
async def test_any_failure_inside_a_local_stream_reaches_its_caller(
    home: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = home.app.engine.client if home.app.engine else None
    assert client is not None

    def broken(*_: object, **__: object) -> Callable[[], None]:
        async def generate() -> Any:
            raise OverflowError("too big")
            yield

        return generate()  # type: ignore[no-any-return]

    monkeypatch.setattr(client, "generate", broken)
    async with asyncio.timeout(10):
        status, _, body = await home.chat(ask_local("What is 2 + 3?"))
    assert (status, body["error"]["code"]) == (500, "internal_error")
