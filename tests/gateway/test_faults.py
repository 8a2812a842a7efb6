"""An upstream that misbehaves: what the caller sees, what is billed, and what is never passed off as success."""

import pytest

from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, StartGateway, ask
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [fake.status(500), fake.status(503), fake.status(429, {"retry-after-ms": "10"}), fake.status(408), fake.reset],
    ids=["500", "503", "429", "408", "reset"],
)
async def test_a_passing_fault_before_the_first_byte_is_retried(
    gateway: Gateway, upstream: FakeUpstream, fault: fake.Fault, stream: bool
) -> None:
    upstream.faults = [fault]
    status, headers, _ = await (gateway.stream(ask()) if stream else gateway.chat(ask()))
    assert status == 200
    assert headers["x-leadline-attempts"] == "2"
    (row,) = await gateway.rows()
    assert [a["outcome"] for a in row["attempt_rows"]][1] == "ok"
    assert len(upstream.bodies) == 2


async def test_an_empty_stream_is_retried(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.empty_stream]
    status, headers, raw = await gateway.stream(ask())
    assert (status, headers["x-leadline-attempts"]) == (200, "2")
    assert raw.endswith(fake_done())


def fake_done() -> bytes:
    return b"data: [DONE]\n\n"


async def test_the_fallback_serves_when_the_first_choice_cannot_be_reached(gateway: Gateway) -> None:
    status, headers, _ = await gateway.chat(ask(model="fragile"))
    assert (status, headers["x-leadline-model"], headers["x-leadline-attempts"]) == (200, "cheap", "2")
    (row,) = await gateway.rows()
    first, second = row["attempt_rows"]
    assert (first["outcome"], first["cost_nanousd"]) == ("connect", 0)
    assert second["cost_nanousd"] == row["cost_nanousd"]


async def test_a_dead_upstream_without_a_fallback_is_a_clear_502(gateway: Gateway) -> None:
    status, headers, body = await gateway.chat(ask(model="gone"))
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (502, "upstream_failed", "true")
    assert "dead cannot be reached" in body["error"]["message"]
    (row,) = await gateway.rows()
    assert (row["outcome"], row["http_status"], row["cost_nanousd"]) == ("error", 502, 0)


async def test_a_refused_request_is_the_callers_to_fix(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(400)]
    status, headers, body = await gateway.chat(ask(model="auto"))
    assert (status, headers["x-should-retry"]) == (400, "false")
    assert body["error"] == {
        "message": "fault 400", "type": "fault", "param": None, "code": "f400", "provider": "fake",
    }  # fmt: skip
    assert len(upstream.bodies) == 1


async def test_the_gateways_own_bad_credentials_are_not_the_callers(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(401)]
    status, _, body = await gateway.chat(ask())
    assert (status, body["error"]["type"]) == (502, "upstream_error")
    assert len(upstream.bodies) == 1


async def test_a_long_retry_after_is_passed_on_not_waited_for(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(429, {"retry-after": "60"})]
    status, headers, body = await gateway.chat(ask())
    assert (status, body["error"]["code"]) == (429, "upstream_rate_limited")
    assert float(headers["retry-after-ms"]) == 60_000
    assert len(upstream.bodies) == 1


async def test_redirects_are_not_followed(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(302, {"location": "http://127.0.0.1:9/steal"})] * 2
    status, _, body = await gateway.chat(ask())
    assert status == 502
    assert "redirects are not followed" in body["error"]["message"]


@pytest.mark.parametrize("fault", [fake.invalid_json, fake.silence], ids=["invalid json", "silence"])
async def test_what_may_have_been_billed_is_billed_as_an_estimate(
    start_gateway: StartGateway, upstream: FakeUpstream, fault: fake.Fault
) -> None:
    upstream.faults = [fault, fault]
    async with start_gateway(timeout="1s" if fault is fake.silence else "60s") as gateway:
        status, _, body = await gateway.chat(ask())
        (row,) = await gateway.rows()
    assert status == (504 if fault is fake.silence else 502)
    assert "error" in body
    assert row["cost_estimated"]
    assert row["cost_nanousd"] > 0
    assert row["cost_nanousd"] == sum(a["cost_nanousd"] for a in row["attempt_rows"])


@pytest.mark.parametrize(
    "fault", [fake.cut_stream, fake.unfinished_stream, fake.error_in_stream], ids=["cut", "no end", "error event"]
)
async def test_a_broken_stream_never_ends_as_success(
    gateway: Gateway, upstream: FakeUpstream, fault: fake.Fault
) -> None:
    upstream.faults = [fault]
    status, _, raw = await gateway.stream(ask())
    assert status == 200
    assert b"[DONE]" not in raw
    assert b'data: {"error":{' in raw
    assert len(upstream.bodies) == 1, "nothing is retried after the first byte"
    (row,) = await gateway.rows()
    assert row["outcome"] == "error"
    assert row["cost_nanousd"] > 0
    assert raw.endswith(b": leadline-cost-nanousd %d\n\n" % row["cost_nanousd"])
