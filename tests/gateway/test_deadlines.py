"""Every bound on time: of a request, of an attempt, to the first byte, and between two."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 30s, retries: 3, breaker: {{failures: 1, open: 1h}}}}
  impatient: {{base_url: "{url}", timeout: 30s, first_byte_timeout: 300ms, retries: 0, breaker: off}}
  listening: {{base_url: "{url}", timeout: 30s, idle_timeout: 300ms, retries: 0, breaker: off}}
  short: {{base_url: "{url}", timeout: 400ms, retries: 0, breaker: off}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  impatient: {{provider: impatient, model: dear, context: 16000, max_output: 1000, price: free}}
  listening: {{provider: listening, model: dear, context: 16000, max_output: 1000, price: free}}
  short: {{provider: short, model: dear, context: 16000, max_output: 1000, price: free}}
routes:
  - {{name: bounded, when: {{model: bounded}}, use: [cheap], deadline: 4s, cache: off}}
  - {{name: eager, when: {{model: eager}}, use: [impatient], on_failure: [cheap], cache: off}}
"""


@pytest.fixture
async def gateway(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as running_gateway:
        yield running_gateway


@pytest.mark.parametrize("stream", [False, True])
async def test_a_routes_deadline_ends_the_request_and_its_attempt(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    gone = asyncio.Event()

    async def slow(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        try:
            await asyncio.sleep(30)
        finally:
            gone.set()
        return web.Response()

    upstream.faults = [slow]
    body = ask(model="bounded", stream=stream)
    status, headers, answer = await gateway.chat(body, **{"x-leadline-timeout": "60"})
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert "deadline of 4 s" in answer["error"]["message"], "a caller cannot lengthen the policy's"
    assert headers["x-should-retry"] == "false"
    async with asyncio.timeout(20):
        await gone.wait()
    (row,) = await gateway.rows()
    (attempt,) = row["attempt_rows"]
    assert (row["outcome"], row["error_code"], attempt["outcome"]) == ("error", "deadline_exceeded", "deadline")
    assert attempt["cost_estimated"]
    assert headers["x-leadline-cost-nanousd"] == str(row["cost_nanousd"])
    assert row["overhead_us"] < row["duration_us"] / 2, "the upstream was waited for, not us"
    world = gateway.app.state.lifecycle.world
    assert world.breakers["cheap"].state == "closed", "a request's own haste says nothing of its target"


async def test_a_caller_may_ask_for_less_time(gateway: Gateway, upstream: FakeUpstream) -> None:
    for model in ("bounded", "cheap"):
        upstream.faults = [fake.silence]
        status, _, answer = await gateway.chat(ask(model=model), **{"x-leadline-timeout": "0.2"})
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert "deadline of 0.2 s" in answer["error"]["message"]
    for value in ("0", "-1", "1s", "nan", "1e3", ""):
        status, _, answer = await gateway.chat(ask(), **{"x-leadline-timeout": value})
        assert (status, answer["error"]["code"]) == (400, "invalid_request")


async def test_a_deadline_in_the_middle_of_a_stream_ends_it_with_an_error(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.words, upstream.pace_s = 1000, 0.05
    status, _, raw = await gateway.stream(ask(model="bounded"))
    assert status == 200
    assert b"[DONE]" not in raw
    assert b'"code":"deadline_exceeded"' in raw.split(b"\n\n")[-3]
    await until(lambda: upstream.closed_early == 1)
    (row,) = await gateway.rows()
    (attempt,) = row["attempt_rows"]
    assert (row["outcome"], row["http_status"], attempt["outcome"]) == ("error", 504, "deadline")
    assert attempt["cost_estimated"]
    assert attempt["output_tokens"] >= raw.count(b'"content"')


async def test_no_wait_is_begun_that_the_deadline_does_not_leave(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(503, {"retry-after-ms": "4900"})]
    status, _, answer = await gateway.chat(ask(model="bounded"))
    assert (status, answer["error"]["code"]) == (502, "upstream_failed"), "a wait would have ended with the deadline"


async def test_the_first_byte_has_a_bound_of_its_own_and_then_another_model_answers(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    for stream in (False, True):
        upstream.faults = [fake.silence]
        send = gateway.stream if stream else gateway.chat
        status, headers, _ = await send(ask(model="eager"))
        assert (status, headers["x-leadline-model"]) == (200, "cheap")
    rows = await gateway.rows()
    assert [[a["outcome"] for a in row["attempt_rows"]] for row in rows] == [["timeout", "ok"]] * 2


async def test_a_stream_that_falls_silent_ends_with_an_error(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.words, upstream.pace_s = 3, 20
    status, _, raw = await gateway.stream(ask(model="listening"))
    assert status == 200
    assert b"[DONE]" not in raw
    assert b'"code":"upstream_timeout"' in raw
    (row,) = await gateway.rows()
    assert (row["outcome"], row["error_code"]) == ("error", "upstream_timeout")
    assert row["attempt_rows"][0]["outcome"] == "timeout"


async def test_an_attempt_has_a_bound_as_a_whole(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.words, upstream.pace_s = 1000, 0.05
    _, _, raw = await gateway.stream(ask(model="short"))
    assert b'"code":"upstream_timeout"' in raw
    assert b"[DONE]" not in raw
