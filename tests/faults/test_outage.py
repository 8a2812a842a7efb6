"""T24, the other half: an outage is not made worse by those who suffer it, and a hedge is worth its bounded price."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.faults.books import join
from tests.gateway.conftest import Gateway, running, until
from tests.upstream.process import upstream_process

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 10s, retries: 3, breaker: off}}
models:
  cheap: {{provider: fake, model: small, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.0755555/Mtok, cache_write: $0.1875/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: fake, model: large, context: 200000, max_output: 1000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, cache_write: $3.125/Mtok, output: $10/Mtok,
                 reasoning: $12.3456789/Mtok}}}}
routes:
  - {{name: hedged, when: {{model: hedged}}, use: [dear], on_failure: [cheap], hedge: {{after: 50ms, max_extra: 100%}},
     cache: off}}
"""
REQUESTS = 400
MAX_AMPLIFICATION = 1.2


async def ask(gateway: Gateway, call: str, **fields: Any) -> int:
    body = {"messages": [{"role": "user", "content": f"how deep is {call}"}], "max_tokens": 100, **fields}
    body["metadata"] = {**fields["metadata"], "call": call}
    async with gateway.session.post(
        f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.headers(**{"X-Session-Id": call})
    ) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize("stream", [False, True])
async def test_retries_add_little_to_a_total_outage(tmp_path: Path, stream: bool) -> None:
    with upstream_process(tmp_path / "truth") as upstream:
        async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
            gate = asyncio.Semaphore(32)

            async def one(number: int) -> int:
                async with gate:
                    metadata = {"fault": "F12"}
                    return await ask(gateway, f"call-{number}", model="cheap", stream=stream, metadata=metadata)

            statuses = await asyncio.gather(*[one(number) for number in range(REQUESTS)])
            await gateway.app.state.lifecycle.ledger.flush(timeout_s=30)
            calls = join(upstream.rows(), gateway.app.state.lifecycle.ledger.engine)
    assert set(statuses) <= {502, 503}
    tried = sum(len(call.truth) for call in calls.values())
    assert tried == sum(len(call.attempts) for call in calls.values())
    assert REQUESTS < tried <= REQUESTS * MAX_AMPLIFICATION, "some retries, and few"


async def test_the_loser_of_a_hedge_is_cancelled_and_billed(tmp_path: Path) -> None:
    """A first attempt that never answers, a second that does: the caller waits for neither more nor less than one."""
    with upstream_process(tmp_path / "truth") as upstream:
        async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
            # A hedge may cost at most what its route has spent: this is what it has.
            assert await ask(gateway, "paid", model="hedged", n=64, metadata={"words": "100"}) == 200
            metadata = {"fault": "F05", "on": "first"}
            assert await ask(gateway, "hedged", model="hedged", metadata=metadata) == 200
            await gateway.app.state.lifecycle.ledger.flush(timeout_s=30)
            await until(lambda: any(row.disconnected for row in upstream.rows()))  # it hears so after the caller
            calls = join(upstream.rows(), gateway.app.state.lifecycle.ledger.engine)
    loser, winner = calls["hedged"].attempts
    assert (loser["outcome"], winner["outcome"]) == ("hedge_lost", "ok")
    assert loser["cost_estimated"]
    assert loser["cost_nanousd"] > 0
    assert not winner["cost_estimated"]
    first, second = calls["hedged"].truth
    assert first.disconnected
    assert winner["cost_nanousd"] == second.nanousd
