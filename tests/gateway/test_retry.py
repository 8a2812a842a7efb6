"""When the same target is asked again: whose word counts, how long the wait is, and what all retries add up to."""

import asyncio
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gateway.edge.asgi import error_headers
from gateway.errors import Unavailable
from gateway.upstream.retry import (
    BACKOFF_S,
    MAX_RETRY_AFTER_S,
    PER_S,
    RESERVE,
    SHARE,
    RetryBudget,
    wait_before_retry,
)
from gateway.upstream.types import UpstreamError
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio


@given(st.floats(0, 1e6))
def test_a_caller_that_waits_as_told_is_not_early(wait_s: float) -> None:
    error = Unavailable("busy", retry_after_s=wait_s)
    told = dict(error_headers(error))
    assert wait_s <= int(told[b"retry-after"]) <= max(1, wait_s + 1)
    assert wait_s * 1000 <= int(told[b"retry-after-ms"]) <= wait_s * 1000 + 1


@given(st.lists(st.one_of(st.just("request"), st.just("retry"), st.floats(0, 100)), max_size=400))
def test_the_budget_bounds_what_retries_add(events: list[Any]) -> None:
    now, requests, retries, waited = 0.0, 0, 0, 0.0
    budget = RetryBudget(lambda: now)
    for event in events:
        if event == "request":
            budget.deposit()
            requests += 1
        elif event == "retry":
            retries += budget.withdraw()
        else:
            now += event
            waited += event
        assert retries <= RESERVE + SHARE * (requests + 1) + PER_S * waited


def test_a_budget_that_is_spent_comes_back_with_time_and_with_requests() -> None:
    now = 0.0
    budget = RetryBudget(lambda: now)
    assert sum(budget.withdraw() for _ in range(100)) == RESERVE
    for _ in range(11):
        budget.deposit()
    assert budget.withdraw()
    assert not budget.withdraw()
    now += 1 / PER_S
    assert budget.withdraw()


def test_backoff_doubles_with_jitter() -> None:
    rng = random.Random(1)
    for retry in range(4):
        waits = [wait_before_retry(UpstreamError("cut", ""), retry, rng) or 0 for _ in range(200)]
        most = BACKOFF_S * 2**retry
        assert most / 2 <= min(waits) < max(waits) <= most
        assert len(set(waits)) > 100


@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (UpstreamError("rate_limit", "", retry_after_s=0.7), 0.7),
        (UpstreamError("status", "", retry_after_s=0.0), 0.0),
        (UpstreamError("rate_limit", "", retry_after_s=MAX_RETRY_AFTER_S + 0.1), None),
        (UpstreamError("status", "", should_retry=False, retry_after_s=0.1), None),
        (UpstreamError("refused", "", should_retry=True, retry_after_s=0.1), 0.1),
        (UpstreamError("refused", ""), None),
        (UpstreamError("auth", ""), None),
        (UpstreamError("content_filter", ""), None),
        (UpstreamError("context_length", ""), None),
    ],
)
def test_the_providers_word_goes_first(error: UpstreamError, wait: float | None) -> None:
    assert wait_before_retry(error, 0, random.Random(1)) == wait


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_retries_by_itself_is_not_helped(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [fake.status(503)]
    send = gateway.stream if stream else gateway.chat
    status, headers, _ = await send(ask(), **{"x-stainless-retry-count": "1"})
    assert (status, headers["x-leadline-attempts"], len(upstream.bodies)) == (502, "1", 1)
    status, headers, _ = await send(ask(), **{"x-stainless-retry-count": "0"})
    assert (status, headers["x-leadline-attempts"]) == (200, "1")


@anyio
async def test_what_the_provider_says_of_retries_is_heeded_and_passed_on(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.faults = [fake.status(503, {"x-should-retry": "false"})]
    status, headers, _ = await gateway.chat(ask())
    assert (status, headers["x-leadline-attempts"], headers["x-should-retry"]) == (502, "1", "false")
    upstream.faults = [fake.status(400, {"x-should-retry": "true", "retry-after-ms": "1"})]
    status, headers, _ = await gateway.chat(ask())
    assert (status, headers["x-leadline-attempts"]) == (200, "2")
    upstream.faults = [fake.status(401)]
    status, headers, _ = await gateway.chat(ask("again"))
    assert (status, headers["x-should-retry"]) == (502, "false"), "our own credentials do not mend by themselves"
    upstream.faults = [fake.status(500)] * 2
    status, headers, _ = await gateway.chat(ask("once more"))
    assert (status, headers["x-leadline-attempts"], headers["x-should-retry"]) == (502, "2", "false")


@anyio
async def test_a_retry_of_a_request_has_its_own_row_and_bill(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.invalid_json]
    assert (await gateway.chat(ask()))[0] == 200
    (row,) = await gateway.rows()
    first, second = row["attempt_rows"]
    assert [a["kind"] for a in row["attempt_rows"]] == ["first", "retry"]
    assert (first["outcome"], first["cost_estimated"], second["outcome"]) == ("bad_answer", True, "ok")
    assert row["cost_nanousd"] == first["cost_nanousd"] + second["cost_nanousd"]
    assert second["cost_nanousd"] == upstream.truth[-1].nanousd
    assert first["output_tokens"] <= 10, "no more can have been written than came"
    assert 0 <= row["overhead_us"] < row["duration_us"]


@anyio
async def test_a_caller_who_leaves_while_a_retry_waits_ends_it(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [fake.status(503, {"retry-after-ms": "4900"})]
    calling = asyncio.create_task(gateway.chat(ask()))
    await until(lambda: upstream.bodies)
    await asyncio.sleep(0.1)
    calling.cancel()
    rows = await gateway.rows()
    while not rows:
        await asyncio.sleep(0.02)
        rows = await gateway.rows()
    (row,) = rows
    assert (row["outcome"], row["cost_nanousd"]) == ("cancelled", 0)
    assert [a["outcome"] for a in row["attempt_rows"]] == ["status"]
    assert len(upstream.bodies) == 1
