"""Requests, tokens and concurrency in one process: exact, all or none, and given back."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import rates as rates_module
from gateway.admission.keys import Principal
from gateway.admission.rates import NO_LIMIT, LimitBook, LocalRates, RateLimit, duration, rate_headers, rate_limits
from gateway.errors import RateLimited
from routers.policy import Limit, Policy
from routers.units import Rate
from tests.gateway.conftest import StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream, silence

anyio = pytest.mark.anyio


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def policy(*limits: Limit) -> Policy:
    return Policy({}, {}, None, (), limits, "0" * 12)


def principal(name: str = "alice", team: str | None = "blue", tenant: str = "acme") -> Principal:
    return Principal(f"id-{name}", name, tenant, "user", team=team)


REQUESTS = RateLimit("requests", "key:k", "key k", 10, 60)
TOKENS = RateLimit("tokens", "key:k", "key k", 1000, 60)
TWO_AT_A_TIME = RateLimit("concurrency", "team:t/b", "team b", 2)


@given(st.integers(1, 20), st.integers(1, 100), st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30)), max_size=60))
def test_no_stretch_of_time_sees_more_than_its_rate(count: int, per_s: int, calls: list[tuple[float, int]]) -> None:
    clock = Clock()
    rates = LocalRates(clock)
    for kind in ("requests", "tokens"):
        limit = RateLimit("requests" if kind == "requests" else "tokens", "key:k", "key k", count, per_s)
        admitted: list[tuple[float, int]] = []
        for gap, tokens in calls:
            clock.now += gap
            weight = 1 if kind == "requests" else min(tokens, count)
            try:
                rates.take((limit,), tokens).release(weight)
            except RateLimited as error:
                clock.now += (error.retry_after_s or 0) + 1e-6  # whoever waits as told is let in
                rates.take((limit,), tokens).release(weight)
            admitted.append((clock.now, weight))
        for i, (start, _) in enumerate(admitted):
            for j in range(i, len(admitted)):
                passed = sum(weight for _, weight in admitted[i : j + 1])
                assert passed <= count + count / per_s * (admitted[j][0] - start) + 1e-3


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000)), max_size=30))
def test_tokens_are_charged_at_the_end_as_they_were(calls: list[tuple[int, int]]) -> None:
    """At a standing clock, what is left is what the calls truly used, however wrong the estimates were."""
    clock = Clock()
    rates = LocalRates(clock)
    used = 0
    for estimate, actual in calls:
        try:
            grant = rates.take((TOKENS,), estimate)
        except RateLimited:
            assert used + min(estimate, 1000) > 1000, "refused although it fitted"
        else:
            grant.release(actual)
            used += actual
    assert rates.left(TOKENS)[0] == max(0, 1000 - used)


def test_a_call_larger_than_a_span_runs_alone_and_is_paid_for() -> None:
    clock = Clock()
    rates = LocalRates(clock)
    rates.take((TOKENS,), 5000).release(3000)
    with pytest.raises(RateLimited) as caught:
        rates.take((TOKENS,), 10)
    assert caught.value.retry_after_s == pytest.approx(120.6)
    clock.now += 120.7
    rates.take((TOKENS,), 10)


def test_concurrency_is_exact_and_given_back_once() -> None:
    rates = LocalRates(Clock())
    first, second = rates.take((TWO_AT_A_TIME,), 0), rates.take((TWO_AT_A_TIME,), 0)
    with pytest.raises(RateLimited, match="team b"):
        rates.take((TWO_AT_A_TIME,), 0)
    first.release(0)
    with pytest.raises(RuntimeError, match="once"):
        first.release(0)
    third = rates.take((TWO_AT_A_TIME,), 0)
    with pytest.raises(RateLimited):
        rates.take((TWO_AT_A_TIME,), 0)
    second.release(0)
    third.release(0)
    assert rates.statistics()["running"] == 0


def test_a_refused_request_takes_of_no_limit() -> None:
    rates = LocalRates(Clock())
    limits = (REQUESTS, TOKENS, TWO_AT_A_TIME)
    grants = [rates.take(limits, 100) for _ in range(2)]
    before = [rates.left(REQUESTS), rates.left(TOKENS)]
    for _ in range(50):
        with pytest.raises(RateLimited, match="Concurrency"):
            rates.take(limits, 100)
    assert [rates.left(REQUESTS), rates.left(TOKENS)] == before
    for grant in grants:
        grant.release(100)


@anyio
async def test_without_limits_there_is_nothing_to_keep() -> None:
    rates = LocalRates()
    assert await rates.admit((), "req_1", 10) is NO_LIMIT
    assert rates.statistics()["meters"] == 0
    assert NO_LIMIT.headers() == []


def test_only_meters_at_rest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "MAX_TRACKED", 10)
    clock = Clock()
    rates = LocalRates(clock)
    running = rates.take((TWO_AT_A_TIME,), 0)
    for i in range(100):
        clock.now += 7
        rates.take((RateLimit("requests", f"key:{i}", f"key {i}", 10, 60),), 0)
    assert rates.statistics()["meters"] <= 10
    assert rates.statistics()["running"] == 1, "a place taken is never forgotten"
    running.release(0)
    assert rates.statistics()["running"] == 0


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([Limit("key", "*", None, Rate(5, 1))], ["key alice 5 requests"]),
        (
            [Limit("key", "*", None, Rate(5, 1), Rate(90, 60), 4), Limit("key", "alice", None, Rate(7, 1))],
            ["key alice 90 tokens", "key alice 4 concurrency", "key alice 7 requests"],
        ),
        (
            [Limit("team", "blue", None, None, None, 3), Limit("team", "red", None, None, None, 1)],
            ["team blue 3 concurrency"],
        ),
        (
            [Limit("tenant", "acme", None, Rate(9, 1)), Limit("tenant", "acme", None, Rate(90, 60))],
            ["tenant acme 9 requests", "tenant acme 90 requests"],
        ),
        ([Limit("run", "*", None, Rate(1, 1)), Limit("key", "bob", None, Rate(1, 1))], []),
    ],
)
def test_a_caller_gets_the_limits_of_its_key_team_and_tenant(limits: Sequence[Limit], expected: list[str]) -> None:
    found = rate_limits(policy(*limits), principal())
    assert [f"{limit.label} {limit.count} {limit.kind}" for limit in found] == expected


def test_the_book_turns_the_page_with_policy_and_principal() -> None:
    book = LimitBook()
    one, two = policy(Limit("key", "*", None, Rate(5, 1))), policy(Limit("key", "*", None, Rate(6, 1)))
    alice = principal()
    assert book.of(one, alice, None) is book.of(one, alice, None)
    assert [limit.count for limit in book.of(two, alice, None)] == [6]
    assert book.of(policy(), alice, None) == ()
    moved = principal(team="red")
    assert book.of(policy(Limit("team", "red", None, Rate(1, 1))), moved, None)[0].label == "team red"


def test_an_agent_run_is_limited_at_its_root() -> None:
    book, limits = LimitBook(), policy(Limit("run", "*", None, None, None, 3), Limit("run", "big", None, Rate(9, 1)))
    paths = (None, "small", "small/research/fetch", "big/x")
    found = [[(limit.label, limit.count) for limit in book.of(limits, principal(), path)] for path in paths]
    assert found == [[], [("run small", 3)], [("run small", 3)], [("run big", 3), ("run big", 9)]]
    meters = [limit.meter for name in "ab" for limit in book.of(limits, principal(name), "small")]
    assert len(set(meters)) == 2, "a run belongs to the key that names it"


def test_headers_speak_of_the_limit_with_the_least_left() -> None:
    wide = RateLimit("requests", "tenant:t", "tenant t", 1000, 3600)
    assert rate_headers([(wide, 700, 1.0), (REQUESTS, 3, 0.0861), (TOKENS, 0, 372.5)]) == [
        (b"x-ratelimit-limit-requests", b"10"),
        (b"x-ratelimit-remaining-requests", b"3"),
        (b"x-ratelimit-reset-requests", b"87ms"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"0"),
        (b"x-ratelimit-reset-tokens", b"6m12.5s"),
    ]
    assert [duration(s) for s in (0, 0.12, 8.64, 360)] == ["0ms", "120ms", "8.64s", "6m0s"]


@anyio
async def test_answers_say_what_is_left_of_the_rates(start_gateway: StartGateway) -> None:
    async with start_gateway('limits: [{key: "*", rate: 600/h}]') as gateway:
        _, headers, _ = await gateway.chat(ask())
        assert headers["x-ratelimit-limit-requests"] == "600"
        assert 595 <= int(headers["x-ratelimit-remaining-requests"]) < 600
        _, headers, _ = await gateway.stream(ask("streamed"))
        assert headers["x-ratelimit-limit-requests"] == "600"
        assert "x-ratelimit-limit-tokens" not in headers


@anyio
async def test_a_refusal_names_the_limit_that_was_met(start_gateway: StartGateway) -> None:
    async with start_gateway('limits: [{key: "*", tokens: 500/h}]') as gateway:
        assert (await gateway.chat(ask(), **{"Cache-Control": "no-store"}))[0] == 200
        while True:
            status, headers, body = await gateway.chat(ask(), **{"Cache-Control": "no-store"})
            if status != 200:
                break
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "Rate limit of key first: faster than 500 tokens per 3600 s" in body["error"]["message"]
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("500", "0")
    assert int(headers["retry-after"]) >= 1


@anyio
async def test_every_end_of_a_request_gives_its_place_back(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    async with start_gateway('limits: [{key: "*", concurrency: 2}]') as gateway:
        rates = gateway.app.state.lifecycle._rates
        assert isinstance(rates, LocalRates)
        statuses = [
            (await gateway.chat(ask()))[0],
            (await gateway.chat(ask(model="unknown")))[0],
            (await gateway.chat(ask(model="gone")))[0],
            (await gateway.stream(ask("s")))[0],
        ]
        assert statuses == [200, 404, 502, 200]
        upstream.faults.append(silence)
        asking = asyncio.create_task(gateway.chat(ask("never mind")))
        await until(lambda: not upstream.faults)
        assert rates.statistics()["running"] == 1
        asking.cancel()
        await until(lambda: rates.statistics()["running"] == 0)
        upstream.pace_s = 0.02
        answers = await asyncio.gather(*(gateway.stream(ask(f"{i}")) for i in range(12)))
        assert {answer[0] for answer in answers} == {200, 429}
        assert all(b"Concurrency limit of key first" in answer[2] for answer in answers if answer[0] == 429)
        assert rates.statistics()["running"] == 0
        assert (await gateway.chat(ask("after")))[0] == 200
