"""All that the attempt engine does, at once and at random: retries, hedges, fallbacks, resumptions, deadlines, leavers.

Whatever comes of a request, nothing of it is left: no hold, no probe, no task, no upstream call; and the books agree.
"""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.attempts import AttemptEngine
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  one: {{base_url: "{url}", timeout: 2s, first_byte_timeout: 1s, idle_timeout: 1s, retries: 1,
        breaker: {{failures: 3, window: 5s, open: 100ms}}}}
  two: {{base_url: "{url}", timeout: 2s, first_byte_timeout: 1s, idle_timeout: 1s, retries: 0,
        breaker: {{failures: 2, window: 5s, open: 100ms}}}}
models:
  dear: {{provider: one, model: dear, context: 16000, max_output: 100, prefix: true,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, output: $10/Mtok}}}}
  cheap: {{provider: two, model: cheap, context: 16000, max_output: 100, prefix: true,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
routes:
  - {{name: all, when: {{model: all}}, use: [dear], on_failure: [cheap], on_stream_failure: resume, deadline: 1500ms,
     hedge: {{after: 30ms, max_extra: 100%}}, cache: off}}
limits: [{{key: "*", budget: $100/day}}]
"""
REQUESTS = 120


def weather(rng: random.Random) -> fake.Fault:
    """What the upstream does with one call."""
    wait, kind = rng.choice([0, 0, 0.02, 0.06, 0.2]), rng.random()

    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(wait)
        if kind < 0.05:
            return await fake.silence(upstream, request, body)
        for limit, fault in (
            (0.15, fake.status(503)),
            (0.2, fake.status(429, {"retry-after-ms": "30"})),
            (0.25, fake.reset),
            (0.3, fake.status(400)),
        ):
            if kind < limit:
                return await fault(upstream, request, body)
        if not body.get("stream"):
            return await (fake.invalid_json(upstream, request, body) if kind < 0.35 else upstream.plain(body))
        return await upstream.stream(request, body, cut_after=3 if kind < 0.5 else None)

    return play


async def one(gateway: Gateway, rng: random.Random) -> int | None:
    """Its status; None: its caller left."""
    await asyncio.sleep(rng.uniform(0, 1.5))
    send = gateway.stream if rng.random() < 0.6 else gateway.chat
    patience = rng.choice([None, None, 0.01, 0.04, 0.1, 0.3])
    try:
        async with asyncio.timeout(patience):
            return (await send(ask(model="all", max_tokens=50)))[0]
    except TimeoutError:
        return None


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_nothing_is_left_of_a_request(upstream: FakeUpstream, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    upstream.pace_s = 0.005
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
        lifecycle = gateway.app.state.lifecycle
        async with aiohttp.ClientSession() as session:
            callers = replace(gateway, session=session)
            assert (await callers.chat(ask(model="all", n=100)))[0] == 200  # what hedges may cost a share of
            upstream.faults = [weather(rng) for _ in range(REQUESTS * 10)]
            statuses = await asyncio.gather(*[one(callers, random.Random(rng.random())) for _ in range(REQUESTS)])
        upstream.faults = []
        await gateway.left_alone()  # who leaves may have sent what is not read yet
        await until(lambda: upstream.open_streams == 0)
        (budget,) = lifecycle.budgets.all()
        await until(lambda: budget.reserved_nanousd == 0)
        rows = await gateway.rows()
        attempts = [attempt for row in rows for attempt in row["attempt_rows"]]

        assert set(statuses) <= {None, 200, 400, 429, 502, 503, 504}
        assert {"first", "hedge", "resume"} <= {a["kind"] for a in attempts}, "it was not idle"
        assert {"ok", "hedge_lost", "cancelled", "cut"} <= {a["outcome"] for a in attempts}
        assert not [a for a in attempts if a["outcome"] in ("running", "error")]
        assert budget.spent_nanousd == sum(row["cost_nanousd"] for row in rows)
        assert all(row["cost_nanousd"] == sum(a["cost_nanousd"] for a in row["attempt_rows"]) for row in rows)
        assert all(0 <= row["overhead_us"] <= row["duration_us"] for row in rows)
        exact = sorted(a["cost_nanousd"] for a in attempts if a["outcome"] == "ok" and not a["cost_estimated"])
        billed = [bill.nanousd for bill in upstream.truth]
        for cost in exact:
            billed.remove(cost)  # each answer that was taken is one that the upstream billed

        engine: AttemptEngine = lifecycle._attempts
        lost = [row for row in rows if any(a["kind"] == "hedge" for a in row["attempt_rows"])]
        assert engine._hedges["all"]._extra <= sum(row["cost_nanousd"] for row in lost)
        await asyncio.sleep(0.15)  # longer than a breaker stays open
        assert lifecycle.world.unavailable() == {}, "no probe is out"
        assert (await gateway.chat(ask(model="all")))[0] == 200
