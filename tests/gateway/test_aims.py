"""What the gateway feeds the routers, end to end: measured times, and seeds and propensities in the ledger."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.conftest import Gateway, ask, running
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio

MODELS = """
version: 1
providers:
  one: {{base_url: "{one}", timeout: 30s, retries: 0}}
  two: {{base_url: "{two}", timeout: 30s, retries: 0}}
models:
  first:  {{provider: one, model: cheap, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  second: {{provider: two, model: cheap, context: 16000, max_output: 1000, price: {{input: $2/Mtok, output: $2/Mtok}}}}
routes:
"""


async def slow_whole(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(5)
    return await upstream.plain(body)


async def served(gateway: Gateway, *, stream: bool) -> str:
    body = ask(model="auto", max_tokens=50)
    _, headers, _ = await (gateway.stream(body) if stream else gateway.chat(body))
    return str(headers["x-leadline-model"])


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_fastest_is_known_from_the_answers_that_came(
    upstream: FakeUpstream, tmp_path: Path, stream: bool
) -> None:
    other = await FakeUpstream(pace_s=0.0).start()
    upstream.pace_s = 0.4  # 12 words: each of the first one's answers takes longer than a busy machine makes one
    upstream.faults = [slow_whole] * 20 if not stream else []
    policy = MODELS.format(one=upstream.url, two=other.url) + (
        "  - {name: auto, when: {model: auto}, candidates: [first, second], objective: fastest, cache: off}\n"
    )
    try:
        async with running(policy, tmp_path / "home") as gateway:
            assert [await served(gateway, stream=stream) for _ in range(2)] == ["first", "second"], "each is tried once"
            assert [await served(gateway, stream=stream) for _ in range(3)] == ["second"] * 3
            told = json.loads((await gateway.rows())[0]["decision"])
            times = {candidate["model"]: candidate["expected_ms"] for candidate in told["candidates"]}
            assert times["first"] > times["second"]
            known = gateway.app.state.lifecycle.world.loads
            assert known is not None
            assert [load.running for load in known.of(["first", "second"]).values()] == [0, 0], "what began has ended"
    finally:
        await other.stop()


@anyio
async def test_headers_say_why_and_with_how_much_thought(upstream: FakeUpstream, tmp_path: Path) -> None:
    policy = MODELS.format(one=upstream.url, two=upstream.url).replace(
        "model: cheap, context", "model: cheap, thinking: {field: reasoning_effort}, context", 1
    )
    policy += "  - {name: auto, when: {model: auto}, candidates: [first+low, second], cache: off}\n"
    async with running(policy, tmp_path / "home") as gateway:
        _, low, _ = await gateway.chat(ask(model="auto"))
        _, said, _ = await gateway.chat({**ask(model="auto"), "reasoning_effort": "high"})
        _, other, _ = await gateway.chat(ask(model="auto"), **{"X-Leadline-Models": "second"})
        _, streamed, _ = await gateway.stream(ask(model="auto"))
        rows = await gateway.rows()
    assert (low["x-leadline-model"], low["x-leadline-effort"]) == ("first", "low")
    assert low["x-leadline-reason"] == streamed["x-leadline-reason"] == "cheapest"
    assert "x-leadline-effort" not in said, "the caller has said it"
    assert (other["x-leadline-model"], "x-leadline-effort" in other) == ("second", False)
    assert {json.loads(row["decision"])["rule"] for row in rows} == {"cheapest"}


@anyio
async def test_what_was_explored_is_in_the_ledger_with_its_seed_and_its_propensity(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    policy = MODELS.format(one=upstream.url, two=upstream.url) + (
        "  - {name: auto, when: {model: auto}, candidates: [first, second], explore: {share: 50%}, cache: off}\n"
    )
    async with running(policy, tmp_path / "home") as gateway:
        for _ in range(20):
            await served(gateway, stream=False)
        decisions = [json.loads(row["decision"]) for row in await gateway.rows()]
    assert {decision["propensity"] for decision in decisions} == {0.5}
    assert {(decision["plan"]["model"], decision.get("explored", False)) for decision in decisions} == {
        ("first", False),
        ("second", True),
    }  # 20 fair draws of one kind: once in half a million runs
    assert len({decision["seed"] for decision in decisions}) == 20
