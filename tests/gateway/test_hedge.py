"""A second attempt beside a slow first: who wins, who is cancelled, who pays, and what it may cost at most."""

import asyncio
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from aiohttp import web
from hypothesis import given

from gateway.attempts import AttemptEngine
from gateway.upstream.hedge import HedgeBudget
from routers.units import format_money
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio

POLICY = (
    fake.TWO_MODELS
    + """\
  free: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: free}}
  unknown: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: unpriced}}
routes:
  - {{name: hedged, when: {{model: hedged}}, use: [dear], on_failure: [cheap], cache: off,
     hedge: {{after: {after}, max_extra: 100%}}}}
  - {{name: unknown, when: {{model: gamble}}, use: [free], on_failure: [unknown], cache: off,
     hedge: {{after: {after}, max_extra: 100%}}}}
  - {{name: free, when: {{model: gratis}}, use: [free], cache: off, hedge: {{after: {after}, max_extra: 1%}}}}
{limits}
"""
)


class Slow:
    """An upstream that takes its time, from when `after` holds: `gone` counts the callers who did not wait for it."""

    def __init__(self, seconds: float = 30, after: Callable[[], object] = lambda: True) -> None:
        self.seconds = seconds
        self.after = after
        self.gone = 0
        self.asked = 0

    async def __call__(self, upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.asked += 1
        try:
            await until(self.after)
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        return await (upstream.stream(request, body) if body.get("stream") else upstream.plain(body))


def start(upstream: FakeUpstream, home: Path, *, after: str = "50ms", limits: str = "") -> Any:
    return running(POLICY.format(url=upstream.url, after=after, limits=limits), home)


@pytest.fixture
async def hedging(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    """Its route has spent enough for a few hedges."""
    async with start(upstream, tmp_path / "home") as gateway:
        upstream.words = 1000
        assert (await gateway.chat(ask(model="hedged", n=64, max_tokens=1000)))[0] == 200
        upstream.words = 12
        yield gateway


def budget_of(gateway: Gateway, route: str = "hedged") -> HedgeBudget:
    attempts: AttemptEngine = gateway.app.state.lifecycle._attempts
    return attempts._hedges[route]


@anyio
async def test_the_share_of_hedges_is_that_of_the_policy_in_force(hedging: Gateway, upstream: FakeUpstream) -> None:
    lifecycle = hedging.app.state.lifecycle
    world = copy(lifecycle.world)
    routes = [replace(one, hedge=one.hedge and replace(one.hedge, max_extra=1e-6)) for one in world.policy.routes]
    world.policy = replace(world.policy, routes=tuple(routes))
    lifecycle.put_in_force(world)
    upstream.faults = [Slow(0.3)]
    assert (await hedging.chat(ask(model="hedged")))[0] == 200
    assert [a["kind"] for a in (await hedging.rows())[0]["attempt_rows"]] == ["first"]


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_late_first_attempt_loses_is_cancelled_and_billed(
    hedging: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    slow = Slow()
    upstream.faults = [slow]
    body = ask(model="hedged", max_tokens=20)
    status, headers, _ = await (hedging.stream(body) if stream else hedging.chat(body))
    assert (status, headers["x-leadline-model"], headers["x-leadline-attempts"]) == (200, "cheap", "2")
    await until(lambda: slow.gone == 1)
    row = (await hedging.rows())[0]
    loser, winner = row["attempt_rows"]
    assert [(a["kind"], a["outcome"]) for a in (loser, winner)] == [("first", "hedge_lost"), ("hedge", "ok")]
    assert loser["cost_estimated"]
    assert loser["cost_nanousd"] > 0
    assert (winner["cost_estimated"], winner["cost_nanousd"]) == (False, upstream.truth[-1].nanousd)
    assert row["cost_nanousd"] == loser["cost_nanousd"] + winner["cost_nanousd"]
    assert (row["model_served"], row["outcome"]) == ("cheap", "ok")
    assert 0 <= row["overhead_us"] <= row["first_byte_us"], "two upstreams are not waited for twice"
    assert budget_of(hedging)._extra == loser["cost_nanousd"], "it is the loser that is extra"


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_first_attempt_that_answers_after_all_wins(
    hedging: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    second = Slow()
    upstream.faults = [Slow(0, lambda: second.asked), second]
    body = ask(model="hedged", max_tokens=20)
    status, headers, _ = await (hedging.stream(body) if stream else hedging.chat(body))
    assert (status, headers["x-leadline-model"]) == (200, "dear")
    await until(lambda: second.gone == second.asked == 1)
    row = (await hedging.rows())[0]
    assert [(a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [("first", "ok"), ("hedge", "hedge_lost")]
    assert (row["model_served"], row["provider"]) == ("dear", "fake")


@anyio
async def test_a_hedge_goes_out_only_within_its_share_of_what_was_spent(upstream: FakeUpstream, tmp_path: Path) -> None:
    async with start(upstream, tmp_path / "home") as gateway:
        for model in ("hedged", "gamble"):
            upstream.faults = [Slow(0.3)]
            assert (await gateway.chat(ask(model=model)))[0] == 200
        upstream.faults = [slow := Slow()]
        assert (await gateway.chat(ask(model="gratis")))[0] == 200
        free, unknown, hedged = await gateway.rows()
    assert len(hedged["attempt_rows"]) == 1, "nothing has been spent yet"
    assert len(unknown["attempt_rows"]) == 1, "what has no price has no bound"
    assert [a["outcome"] for a in free["attempt_rows"]] == ["hedge_lost", "ok"], "what costs nothing always may"
    assert slow.gone == 1


@anyio
async def test_when_both_fail_each_has_been_asked_once(hedging: Gateway, upstream: FakeUpstream) -> None:
    async def late(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await until(lambda: len(upstream.bodies) - before == 2)
        return await fake.status(500)(upstream, request, body)

    before = len(upstream.bodies)
    upstream.faults = [late, fake.status(503)]
    status, headers, body = await hedging.chat(ask(model="hedged", max_tokens=20))
    assert (status, headers["x-leadline-attempts"], headers["x-should-retry"]) == (502, "2", "false")
    assert "fault 500" in body["error"]["message"]
    assert "fault 503" in body["error"]["message"]
    assert len(upstream.bodies) - before == 2
    row = (await hedging.rows())[0]
    assert [(a["model"], a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [
        ("dear", "first", "status"), ("cheap", "hedge", "status"),
    ]  # fmt: skip
    assert (row["cost_nanousd"], budget_of(hedging)._extra) == (0, 0)


@anyio
async def test_a_first_attempt_that_fails_leaves_the_hedge_to_answer(hedging: Gateway, upstream: FakeUpstream) -> None:
    async def late(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await until(lambda: second.asked)
        return await fake.status(400)(upstream, request, body)

    second = Slow(0.6)
    upstream.faults = [late, second]
    status, headers, _ = await hedging.chat(ask(model="hedged", max_tokens=20))
    assert (status, headers["x-leadline-model"]) == (200, "cheap")
    row = (await hedging.rows())[0]
    assert [a["outcome"] for a in row["attempt_rows"]] == ["refused", "ok"]


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_a_race_ends_both(hedging: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    first, second = Slow(), Slow()
    upstream.faults = [first, second]
    tasks = len(asyncio.all_tasks())
    body = ask(model="hedged", max_tokens=20)
    calling = asyncio.create_task(hedging.stream(body) if stream else hedging.chat(body))
    await until(lambda: second.asked == 1)
    calling.cancel()
    await until(lambda: first.gone == second.gone == 1)
    rows = await hedging.rows()
    while len(rows) < 2:
        rows = await hedging.rows()
    row = rows[0]
    assert (row["outcome"], [a["outcome"] for a in row["attempt_rows"]]) == ("cancelled", ["cancelled"] * 2)
    assert all(a["cost_estimated"] for a in row["attempt_rows"])
    assert budget_of(hedging)._extra == row["attempt_rows"][1]["cost_nanousd"]
    await until(lambda: len(asyncio.all_tasks()) <= tasks)


@anyio
async def test_a_hedge_that_the_callers_budget_does_not_hold_does_not_go_out(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    async def prime_and_ask(gateway: Gateway) -> dict[str, Any]:
        upstream.words = 1000
        assert (await gateway.chat(ask(model="hedged", n=64, max_tokens=1000)))[0] == 200
        upstream.words, upstream.faults = 12, [Slow(0.4)]
        assert (await gateway.chat(ask(model="hedged", max_tokens=20)))[0] == 200
        return (await gateway.rows())[0]

    async with start(upstream, tmp_path / "rich", after="10s") as gateway:
        alone = await prime_and_ask(gateway)
        spent = (await gateway.rows())[1]["cost_nanousd"]
    money = format_money(spent + alone["reserved_nanousd"] + 10)  # one attempt at `dear`, and none beside it
    async with start(upstream, tmp_path / "poor", limits=f"limits: [{{key: '*', budget: {money}/day}}]") as gateway:
        row = await prime_and_ask(gateway)
        (budget,) = gateway.app.state.lifecycle.budgets.all()
        assert [a["outcome"] for a in row["attempt_rows"]] == ["ok"]
        assert budget_of(gateway)._extra == budget.reserved_nanousd == 0


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9)), max_size=60),
    st.floats(0.01, 1),
)
def test_hedges_never_cost_more_than_their_share(calls: list[tuple[int, int, int]], share: float) -> None:
    """Each call spends, and its hedge holds at most `worst` and ends up costing no more."""
    budget = HedgeBudget(share)
    spent = extra = 0
    for cost, worst, actual in calls:
        actual = min(actual, worst)
        if budget.reserve(worst):
            assert extra + worst <= spent * share or worst == 0
            budget.settle(worst, actual)
            extra += actual
        budget.spent(cost)
        spent += cost
