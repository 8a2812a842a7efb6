"""What stands in for a target that fails: by the cause, each once, and what is said when nothing does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.upstream.breaker import Breaker
from routers.policy import Breaker as BreakerRule
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  one: {{base_url: "{url}", timeout: 20s, retries: 0, breaker: {{failures: 2, window: 1h, open: 1h}}}}
  two: {{base_url: "{url}", timeout: 20s, retries: 0, breaker: {{failures: 2, window: 1h, open: 1h}}}}
models:
  main: {{provider: one, model: dear, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $2/Mtok}}}}
  thinker: {{provider: one, model: dear, context: 16000, max_output: 1000, price: free,
            thinking: {{field: reasoning_effort}}}}
  costly: {{provider: two, model: cheap, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $2/Mtok}}}}
  dearest: {{provider: two, model: cheap, context: 16000, max_output: 1000,
            price: {{input: $1/Mtok, output: $100/Mtok}}}}
  for_errors: {{provider: two, model: cheap, context: 16000, max_output: 1000, price: free}}
  for_rates: {{provider: two, model: cheap, context: 16000, max_output: 1000, price: free}}
  for_length: {{provider: two, model: cheap, context: 900000, max_output: 1000, price: free}}
  for_content: {{provider: two, model: cheap, context: 16000, max_output: 1000, price: free}}
routes:
  - name: by-cause
    when: {{model: by-cause}}
    use: [main]
    cache: off
    on_failure: {{error: [for_errors, for_rates], rate_limit: [for_rates], context_length: [for_errors, for_length],
                 content_filter: [for_content]}}
  - name: none
    when: {{model: none}}
    use: [main]
    cache: off
    on_failure: {{error: [for_errors], rate_limit: [], content_filter: [], context_length: []}}
  - {{name: plain, when: {{model: plain}}, use: [main], on_failure: [for_errors], cache: off}}
  - {{name: costly, when: {{model: costly-fallback}}, use: [main], on_failure: [costly], cache: off}}
  - {{name: alone, when: {{model: alone}}, use: [main], cache: off}}
  - {{name: tight, when: {{model: tight}}, use: [main], on_failure: [dearest], cache: off}}
  - {{name: thinking, when: {{model: thinking}}, candidates: [thinker+high], cache: off}}
  - {{name: judged, when: {{model: judged}}, candidates: ["main>costly"], cache: off,
     accept: {{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}}}}
"""


@pytest.fixture
async def gateway(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as running_gateway:
        yield running_gateway


def breakers(gateway: Gateway) -> dict[str, Breaker]:
    found: dict[str, Breaker] = gateway.app.state.lifecycle.world.breakers
    return found


def refusal(code: str) -> fake.Fault:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        error = {"message": "no", "type": "invalid_request_error", "param": None, "code": code}
        return web.json_response({"error": error}, status=400)

    return play


CAUSES: dict[str, tuple[fake.Fault, str, int]] = {
    "error": (fake.status(500), "for_errors", 200),
    "rate_limit": (fake.status(429, {"retry-after": "30"}), "for_rates", 429),
    "context_length": (refusal("context_length_exceeded"), "for_length", 400),
    "content_filter": (refusal("content_filter"), "for_content", 400),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cause", CAUSES)
async def test_each_cause_has_its_own_fallbacks(
    gateway: Gateway, upstream: FakeUpstream, cause: str, stream: bool
) -> None:
    fault, stands_in, _ = CAUSES[cause]
    upstream.faults = [fault]
    body = ask(model="by-cause")
    status, headers, _ = await (gateway.stream(body) if stream else gateway.chat(body))
    assert (status, headers["x-leadline-model"], headers["x-leadline-attempts"]) == (200, stands_in, "2")
    (row,) = await gateway.rows()
    assert [a["kind"] for a in row["attempt_rows"]] == ["first", "fallback"]
    assert row["model_served"] == stands_in


@pytest.mark.parametrize("cause", CAUSES)
async def test_an_empty_list_means_that_nothing_stands_in(gateway: Gateway, upstream: FakeUpstream, cause: str) -> None:
    fault, _, code = CAUSES[cause]
    upstream.faults = [fault]
    status, headers, _ = await gateway.chat(ask(model="none"))
    assert status == code
    assert len(upstream.bodies) == (2 if code == 200 else 1)
    if code == 429:
        assert headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("cause", "status"), [("error", 200), ("rate_limit", 200), ("content_filter", 200), ("context_length", 400)]
)
async def test_a_plain_list_stands_in_for_all_causes_where_it_can(
    gateway: Gateway, upstream: FakeUpstream, cause: str, status: int
) -> None:
    """A fallback whose context is as short is not asked what the first could not take."""
    upstream.faults = [CAUSES[cause][0]]
    assert (await gateway.chat(ask(model="plain")))[0] == status


async def test_a_request_that_is_wrong_goes_nowhere_else(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(422)]
    status, _, body = await gateway.chat(ask(model="by-cause"))
    assert (status, body["error"]["code"], len(upstream.bodies)) == (422, "f422", 1)
    assert breakers(gateway)["main"].state == "closed"


async def test_a_refusal_after_other_failures_says_those_too(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(429, {"retry-after": "9"}), fake.status(422)]
    status, _, body = await gateway.chat(ask(model="by-cause"))
    assert (status, body["error"]["code"]) == (422, "f422"), "the provider's own error"
    assert body["error"]["provider"] == "two"
    assert "429" in body["error"]["before"]


async def test_each_target_is_asked_once_along_the_chain_of_causes(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(429, {"retry-after": "9"}), fake.status(500), fake.status(500)]
    status, headers, body = await gateway.chat(ask(model="by-cause"))
    assert (status, headers["x-leadline-attempts"], headers["x-should-retry"]) == (502, "3", "false")
    (row,) = await gateway.rows()
    assert [a["model"] for a in row["attempt_rows"]] == ["main", "for_rates", "for_errors"]
    assert body["error"]["message"].count("fault") == 2, "what was said twice is told once"


async def test_an_open_breaker_is_passed_by_without_a_call(gateway: Gateway, upstream: FakeUpstream) -> None:
    for _ in range(2):
        upstream.faults = [fake.status(500)]
        assert (await gateway.chat(ask(model="plain")))[0] == 200
    asked = len(upstream.bodies)
    status, headers, _ = await gateway.chat(ask(model="plain"))
    assert (status, headers["x-leadline-model"], len(upstream.bodies)) == (200, "for_errors", asked + 1)
    assert headers["x-leadline-degraded"] == "unavailable"
    status, headers, body = await gateway.chat(ask(model="alone"))
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (503, "unavailable", "true")
    assert "breaker open" in body["error"]["message"]
    assert float(headers["retry-after-ms"]) > 3_000_000


async def test_streams_that_always_break_open_the_breaker(gateway: Gateway, upstream: FakeUpstream) -> None:
    for _ in range(2):
        upstream.faults = [fake.cut_stream]
        _, _, raw = await gateway.stream(ask(model="alone"))
        assert b"[DONE]" not in raw
    assert breakers(gateway)["main"].state == "open"


@pytest.mark.parametrize("headers", [{"retry-after": "20"}, None], ids=["told", "bare"])
async def test_a_429_stays_one_while_its_target_rests(
    gateway: Gateway, upstream: FakeUpstream, headers: dict[str, str] | None
) -> None:
    for _ in range(2):
        upstream.faults = [fake.status(429, headers)]
        status, _, body = await gateway.chat(ask(model="alone"))
        assert (status, body["error"]["code"]) == (429, "upstream_rate_limited")
    asked = len(upstream.bodies)
    status, said, body = await gateway.chat(ask(model="alone"))
    assert (status, body["error"]["code"], said["x-should-retry"]) == (429, "upstream_rate_limited", "true")
    assert len(upstream.bodies) == asked <= 2
    wait_ms = float(said["retry-after-ms"])
    assert wait_ms > (0 if headers else 3_000_000)
    assert wait_ms <= (20_000 if headers else 3_600_000)


async def test_when_all_are_limited_the_soonest_is_named(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(429, {"retry-after": "30"}), fake.status(429, {"retry-after": "12"})]
    for _ in range(2):  # asked and refused, then left alone
        status, headers, body = await gateway.chat(ask(model="plain"))
        assert (status, body["error"]["code"], len(upstream.bodies)) == (429, "upstream_rate_limited", 2)
        assert 0 < float(headers["retry-after-ms"]) <= 12_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def resting(gateway: Gateway, model: str) -> Breaker:
    """The breaker of a model, by a clock that stands still."""
    breakers(gateway)[model] = Breaker(BreakerRule(failures=1, window_ms=1000, open_ms=1000), Clock())
    return breakers(gateway)[model]


@pytest.mark.parametrize("also", ["nothing", "limited", "broken"])
async def test_a_rate_limit_stays_one_where_the_fallback_is_over_budget(
    upstream: FakeUpstream, tmp_path: Path, also: str
) -> None:
    """Whatever else speaks against a model that the budget refuses, its time is not waited for."""
    policy = POLICY.format(url=upstream.url) + 'limits: [{key: "*", budget: $0.05/day}]\n'
    async with running(policy, tmp_path / "home") as gateway:
        resting(gateway, "main").limited(30)
        dearest = resting(gateway, "dearest")
        if also == "limited":
            dearest.limited(12)
        elif also == "broken":
            dearest.failed()
        status, headers, body = await gateway.chat(ask(model="tight", max_tokens=1000))
        assert (status, body["error"]["code"]) == (429, "upstream_rate_limited")
        assert headers["retry-after-ms"] == "30000"
        assert "budget left" in body["error"]["message"]
        assert upstream.bodies == []


async def test_a_rate_limit_stays_one_where_the_candidate_has_an_effort(gateway: Gateway) -> None:
    resting(gateway, "thinker").limited(30)
    status, headers, _ = await gateway.chat(ask(model="thinking"))
    assert (status, headers["retry-after-ms"]) == (429, "30000")


@pytest.mark.parametrize("stage", ["main", "costly"])
async def test_a_rate_limit_stays_one_where_a_stage_of_a_cascade_is_limited(gateway: Gateway, stage: str) -> None:
    resting(gateway, stage).limited(30)
    status, headers, body = await gateway.chat(ask(model="judged"))
    assert (status, body["error"]["code"], headers["retry-after-ms"]) == (429, "upstream_rate_limited", "30000")


async def test_a_target_that_is_down_beside_one_that_is_limited_is_no_rate_limit(gateway: Gateway) -> None:
    resting(gateway, "main").limited(30)
    resting(gateway, "for_errors").failed()
    status, headers, _ = await gateway.chat(ask(model="plain"))
    assert (status, headers["retry-after-ms"]) == (503, "1000")


def rested(gateway: Gateway, model: str) -> Breaker:
    """The breaker of a model that failed; its time is up."""
    clock = Clock()
    breaker = breakers(gateway)[model] = Breaker(BreakerRule(failures=1, window_ms=1000, open_ms=1000), clock)
    breaker.failed()
    clock.now += 1
    return breaker


async def test_a_caller_who_leaves_the_probe_gives_its_place_back(gateway: Gateway, upstream: FakeUpstream) -> None:
    half_open = rested(gateway, "main")
    upstream.faults = [fake.silence]
    probe = asyncio.create_task(gateway.chat(ask(model="alone")))
    await until(lambda: len(upstream.bodies) == 1)
    status, _, body = await gateway.chat(ask(model="alone"))
    assert (status, len(upstream.bodies)) == (503, 1)
    assert "one request is trying it" in body["error"]["message"]
    probe.cancel()
    await until(lambda: half_open.reason() is None)
    assert (await gateway.chat(ask(model="alone")))[0] == 200
    assert half_open.state == "closed"


async def test_a_probe_that_no_budget_holds_gives_its_place_back(upstream: FakeUpstream, tmp_path: Path) -> None:
    """An answer that is cut is billed at its worst; what is left does not pay for the fallback."""
    policy = POLICY.format(url=upstream.url) + 'limits: [{key: "*", budget: $0.004/day}]\n'
    async with running(policy, tmp_path / "home") as gateway:
        breaker = rested(gateway, "costly")
        upstream.faults = [fake.cut_answer]
        status, headers, _ = await gateway.chat(ask(model="costly-fallback", max_tokens=1000))
        assert (status, headers["x-leadline-attempts"], len(upstream.bodies)) == (502, "1", 1)
        assert (breaker.state, breaker.reason()) == ("half_open", None)
        (budget,) = gateway.app.state.lifecycle.budgets.all()
        assert budget.reserved_nanousd == 0
