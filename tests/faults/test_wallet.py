"""T24: denial of wallet. Whatever is asked and whatever goes wrong, a call costs no more than `explain` says before."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.faults.books import Call, join
from tests.gateway.conftest import Gateway, running
from tests.upstream.process import upstream_process

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  first: {{base_url: "{url}", timeout: 2s, first_byte_timeout: 1s, idle_timeout: 1s, retries: 2, breaker: off}}
  second: {{base_url: "{url}", timeout: 2s, first_byte_timeout: 1s, idle_timeout: 1s, retries: 2, breaker: off}}
models:
  cheap: {{provider: first, model: small, context: 200000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.0755555/Mtok, cache_write: $0.1875/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: second, model: large, context: 200000, max_output: 1000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, cache_write: $3.125/Mtok, output: $10/Mtok,
                 reasoning: $12.3456789/Mtok}}}}
  tiered: {{provider: first, model: tiered, context: 200000, max_output: 1000,
           price: {{input: $1.25/Mtok, cached_input: $0.31/Mtok, output: $10/Mtok,
                   tiers: [{{above: 40, input: $2.50/Mtok, cached_input: $0.625/Mtok, output: $15/Mtok}}]}}}}
routes:
  - {{name: fallen, when: {{model: fallen}}, use: [cheap], on_failure: [dear, tiered], cache: off}}
  - {{name: hedged, when: {{model: hedged}}, use: [dear], on_failure: [cheap], hedge: {{after: 50ms, max_extra: 100%}},
     cache: off}}
limits: [{{key: "*", budget: $1000/month}}]
"""
TOOL = {"type": "function", "function": {"name": "sound", "parameters": {"type": "object", "properties": {}}}}
LOOP = [
    message
    for turn in range(20)
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": f"c{turn}", "type": "function", "function": {"name": "sound", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": f"c{turn}", "content": "six fathoms " * 20},
    )
]  # fmt: skip
GREEDY = {"words": "1000", "reasoning": "0"}
"""As much as the model writes when nobody stops it."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "no limit at all": {"model": "dear", "metadata": GREEDY},
    "many choices": {"model": "dear", "n": 16, "metadata": GREEDY},
    "many choices, few tokens": {"model": "cheap", "n": 64, "max_tokens": 1, "metadata": GREEDY},
    "both caps, the larger one counts": {
        "model": "dear", "max_tokens": 1000, "max_completion_tokens": 10, "metadata": GREEDY,
    },
    "long context": {"model": "dear", "content": "a " * 60_000, "metadata": GREEDY},
    "long context, dear tier": {"model": "tiered", "content": "a " * 60_000, "metadata": GREEDY},
    "tool loop": {"model": "dear", "messages": LOOP, "tools": [TOOL] * 50, "metadata": GREEDY},
    "every prompt written to the cache": {
        "model": "dear", "content": "a " * 5_000, "metadata": {**GREEDY, "written": "9999999", "cached": "0"},
    },
    "nothing but hidden reasoning": {
        "model": "dear", "metadata": {"words": "0", "reasoning": "1000", "hidden": "1"},
    },
    "reasoning in every choice": {"model": "dear", "n": 8, "metadata": {"words": "0", "reasoning": "1000"}},
    "billed answers that cannot be read": {
        "model": "fallen", "metadata": {**GREEDY, "fault": "F15", "variant": "truncated"},
    },
    "answers that never come": {"model": "fallen", "metadata": {**GREEDY, "fault": "F05"}},
    "answers cut in the middle": {
        "model": "fallen", "metadata": {**GREEDY, "fault": "F18", "variant": "middle", "after": "500"},
    },
    "usage never said": {"model": "fallen", "n": 4, "metadata": {**GREEDY, "fault": "F26", "variant": "missing"}},
    "a hedge beside a slow answer": {"model": "hedged", "n": 2, "metadata": {"words": "3", "pace_ms": "150"}},
    "hedges that fail": {"model": "hedged", "metadata": {**GREEDY, "fault": "F15", "variant": "truncated"}},
}  # fmt: skip


def body_of(name: str, stream: bool) -> tuple[str, dict[str, Any]]:
    fields = dict(SCENARIOS[name])
    call = f"{name}, streamed" if stream else name
    content = fields.pop("content", "how deep is it")
    messages = [{"role": "user", "content": f"{call}: {content}"}, *fields.pop("messages", [])]
    return call, {**fields, "messages": messages, "stream": stream, "metadata": {**fields["metadata"], "call": call}}


async def bound_then_call(gateway: Gateway, call: str, body: dict[str, Any]) -> int:
    """What `explain` says the call may cost at the most; then the call itself."""
    async with gateway.session.post(
        f"{gateway.url}/leadline/v1/explain", json=body, headers=gateway.headers()
    ) as response:
        told = await response.json()
        assert response.status == 200, told
        bound: int = told["decision"]["worst_case_nanousd"]
    async with gateway.session.post(
        f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.headers(**{"X-Session-Id": call})
    ) as response:
        await response.read()
    return bound


def check(name: str, bound: int, call: Call) -> None:
    spent = call.request["cost_nanousd"]
    assert 0 < spent <= bound, f"{name}: {spent} spent, {bound} explained"
    billed = sum(row.nanousd for row in call.truth)
    assert billed <= bound, f"{name}: {billed} billed by the provider, {bound} explained"
    assert sum(a["cost_nanousd"] for a in call.attempts) <= call.request["reserved_nanousd"], (
        f"{name}: not all was held"
    )
    lost = sum(attempt["outcome"] == "hedge_lost" for attempt in call.attempts)  # perhaps before it reached anybody
    assert len(call.attempts) - lost <= len(call.truth) <= len(call.attempts), name


@pytest.mark.timeout(300)
async def test_no_call_costs_more_than_explain_says_before(tmp_path: Path) -> None:
    bodies = [body_of(name, stream) for name in SCENARIOS for stream in (False, True)]
    with upstream_process(tmp_path / "truth") as upstream:
        async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
            gate = asyncio.Semaphore(8)

            async def one(call: str, body: dict[str, Any]) -> int:
                async with gate:
                    return await bound_then_call(gateway, call, body)

            bounds = await asyncio.gather(*[one(call, body) for call, body in bodies])
            lifecycle = gateway.app.state.lifecycle
            await lifecycle.ledger.flush(timeout_s=30)
            calls = join(upstream.rows(), lifecycle.ledger.engine)
            assert [budget.reserved_nanousd for budget in lifecycle.budgets.all()] == [0]
    assert set(calls) == {call for call, _ in bodies}
    for (call, _), bound in zip(bodies, bounds, strict=True):
        check(call, bound, calls[call])
