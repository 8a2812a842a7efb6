"""Limits of several workers on one real Redis: together no more than one worker alone would let in."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.admission.rates import Grant, RateLimit
from gateway.admission.shared_rates import PREFIX, SharedRates
from gateway.errors import RateLimited
from gateway.redis_link import RedisLink

pytestmark = pytest.mark.anyio

Workers = Callable[..., list[SharedRates]]


@pytest.fixture
async def workers(redis_url: str) -> AsyncIterator[Workers]:
    opened: list[tuple[RedisLink, SharedRates]] = []

    def open_(count: int, **options: Any) -> list[SharedRates]:
        # Patient links: this machine may be busy, and here it is Redis's own arithmetic that is looked at.
        links = [RedisLink(redis_url, lambda up: None, timeout_s=20) for _ in range(count)]
        opened.extend((link, SharedRates(link, **options)) for link in links)
        return [rates for _, rates in opened[-count:]]

    yield open_
    for link, rates in opened:
        await rates.close()
        await link.close()


def limit(kind: str, count: int, per_s: int = 0) -> RateLimit:
    scope = f"key:{uuid.uuid4()}"  # the Redis is shared by all tests
    assert kind in ("requests", "tokens", "concurrency")
    return RateLimit(kind, scope, "key k", count, per_s)  # type: ignore[arg-type]


async def attempts(workers: list[SharedRates], limits: tuple[RateLimit, ...], calls: int, tokens: int = 0) -> list[Any]:
    return await asyncio.gather(
        *(workers[i % len(workers)].admit(limits, f"req_{uuid.uuid4().hex}", tokens) for i in range(calls)),
        return_exceptions=True,
    )


def admitted(answers: list[Any]) -> list[Grant]:
    for answer in answers:
        assert not isinstance(answer, BaseException) or isinstance(answer, RateLimited), answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def test_racing_workers_together_pass_exactly_the_limit(workers: Workers) -> None:
    shared = workers(3)
    requests, tokens, places = limit("requests", 40, 3600), limit("tokens", 1000, 3600), limit("concurrency", 7)
    assert len(admitted(await attempts(shared, (requests,), 120))) == 40
    assert len(admitted(await attempts(shared, (tokens,), 60, tokens=60))) == 16
    grants = admitted(await attempts(shared, (places,), 60))
    assert len(grants) == 7
    assert all(grant.degraded is None for grant in grants)
    for grant in grants[:3]:
        grant.release(0)
    for rates in shared:
        await rates.close()  # what it gives back has been given
    assert len(admitted(await attempts(shared, (places,), 60))) == 3


async def test_what_one_turn_asks_goes_out_as_one_call(workers: Workers) -> None:
    (rates,) = workers(1)
    wide = limit("requests", 10_000, 60)
    await attempts([rates], (wide,), 1)
    before = rates.calls
    assert len(admitted(await attempts([rates], (wide,), 300))) == 300
    assert rates.calls - before <= 2


async def test_a_refused_request_takes_of_no_limit(workers: Workers) -> None:
    one, two = workers(2)
    requests, places = limit("requests", 100, 3600), limit("concurrency", 1)
    (held,) = admitted(await attempts([one], (requests, places), 1))
    refused = await attempts([one, two], (requests, places), 20)
    assert admitted(refused) == []
    assert all("Concurrency limit of key k" in str(error) for error in refused)
    held.release(0)
    await one.close()
    (grant,) = admitted(await attempts([two], (requests, places), 1))
    left = dict(grant.headers())
    assert left[b"x-ratelimit-limit-requests"] == b"100"
    assert left[b"x-ratelimit-remaining-requests"] == b"98"


async def test_tokens_are_corrected_to_what_was_used(workers: Workers) -> None:
    one, two = workers(2)
    tokens = limit("tokens", 1000, 3600)
    (grant,) = admitted(await attempts([one], (tokens,), 1, tokens=900))
    assert admitted(await attempts([two], (tokens,), 1, tokens=200)) == []
    grant.release(100)
    await one.close()
    (grant,) = admitted(await attempts([two], (tokens,), 1, tokens=850))
    grant.release(5000)  # more than was thought: it is owed
    await two.close()
    (refused,) = await attempts([one], (tokens,), 1, tokens=1)
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_s == pytest.approx((5100 + 1 - 1000) * 3.6, abs=30)


async def test_who_waits_as_told_is_let_in(workers: Workers) -> None:
    one, two = workers(2)
    fast = limit("requests", 20, 1)
    dice = random.Random(1)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(60):
        (answer,) = await attempts([dice.choice([one, two])], (fast,), 1)
        while isinstance(answer, RateLimited):
            assert answer.retry_after_s is not None
            await asyncio.sleep(answer.retry_after_s)
            (answer,) = await attempts([dice.choice([one, two])], (fast,), 1)
    assert loop.time() - began >= (60 - 20) / 20 * 0.9


async def test_a_dead_workers_places_are_free_after_their_lease_and_a_live_ones_are_not(workers: Workers) -> None:
    dead, alive = workers(2, lease_s=5.0, renew_s=0.2)
    one_place, another = limit("concurrency", 1), limit("concurrency", 1)
    client = alive._link.client

    async def lease_ends(place: RateLimit) -> float:
        held: Any = await client.zrange(PREFIX + place.meter, 0, -1, withscores=True)
        return float(held[0][1])

    assert len(admitted(await attempts([dead], (one_place,), 1))) == 1
    (held,) = admitted(await attempts([alive], (another,), 1))
    first = await lease_ends(another)
    assert admitted(await attempts([alive], (one_place,), 1)) == []
    alive.start()
    async with asyncio.timeout(60):
        while await lease_ends(another) == first:
            await asyncio.sleep(0.05)
        while not admitted(await attempts([alive], (one_place,), 1)):
            await asyncio.sleep(0.05)
    assert admitted(await attempts([dead], (another,), 1)) == []
    held.release(0)


async def test_a_caller_who_leaves_while_asking_leaves_nothing_taken(workers: Workers) -> None:
    (rates,) = workers(1)
    place = limit("concurrency", 1)
    asking = asyncio.create_task(rates.admit((place,), "req_gone", 0))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await rates.close()
    assert len(admitted(await attempts([rates], (place,), 1))) == 1


async def test_every_meter_expires(workers: Workers) -> None:
    (rates,) = workers(1)
    limits = limit("requests", 5, 60), limit("tokens", 500, 60), limit("concurrency", 3)
    await attempts([rates], limits, 2, tokens=10)
    client = rates._link.client
    for entry in limits:
        assert 0 < await client.pttl(PREFIX + entry.meter) <= 62_000
