"""Conversations that stay: what is remembered of them, what leaving costs, and blocks that only one provider reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.redis_link import RedisLink
from gateway.sessions import Conversation, MemorySessions, Prefix
from gateway.shared_sessions import SharedSessions
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio

POLICY = """
version: 1
providers:
  one: {{base_url: "{url}", timeout: 30s, retries: 0}}
  two: {{base_url: "{url}", timeout: 30s, retries: 0}}
models:
  warm: {{provider: one, model: cheap, context: 16000, max_output: 100,
         price: {{input: $2/Mtok, cached_input: $0.2/Mtok, output: $1/Mtok}}}}
  cold: {{provider: two, model: dear, context: 16000, max_output: 100,
         price: {{input: $1/Mtok, cached_input: $0.1/Mtok, output: $1/Mtok}}}}
routes:
  - {{name: stays, when: {{model: stays}}, candidates: [warm, cold], cache: off, affinity: {{bound: {bound}}}}}
  - {{name: goes, when: {{model: goes}}, candidates: [warm, cold], cache: off}}
"""
LONG = " ".join(f"word{at}" for at in range(1500))


def turn(*more: dict[str, Any], model: str = "stays", first: str = LONG) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": first}, *more], "max_tokens": 50}


SAID = ({"role": "assistant", "content": "w0"}, {"role": "user", "content": "and then?"})
ONLY_WARM = {"x-leadline-models": "warm"}


def start(upstream: FakeUpstream, home: Path, bound: str = "strip", **options: Any) -> Any:
    return running(POLICY.format(url=upstream.url, bound=bound), home, **options)


async def served(gateway: Gateway, body: dict[str, Any], **headers: str) -> str:
    status, got, answer = await gateway.chat(body, **headers)
    assert status == 200, answer
    return str(got["x-leadline-model"])


@anyio
async def test_a_conversation_stays_where_its_prefix_is_cached(upstream: FakeUpstream, tmp_path: Path) -> None:
    async with start(upstream, tmp_path / "home") as gateway:
        assert await served(gateway, turn()) == "cold", "the cheaper one, as nothing is cached anywhere"
        assert await served(gateway, turn(first="other " + LONG), **ONLY_WARM) == "warm"
        assert await served(gateway, turn(*SAID, first="other " + LONG)) == "warm"
        told = json.loads((await gateway.rows())[0]["decision"])
        cold = next(candidate for candidate in told["candidates"] if candidate["model"] == "cold")
        assert cold["switch_nanousd"] == round(0.5 * 1516 * 1800), "half of what 1,516 cached tokens save"
        assert "to leave the conversation's model" in cold["rejected"]
        goes = turn(*SAID, model="goes", first="other " + LONG)
        assert await served(gateway, goes) == "cold", "a route without affinity remembers nothing"


@anyio
async def test_a_conversation_is_known_by_its_header_or_by_its_first_words(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    async with start(upstream, tmp_path / "home") as gateway:
        await served(gateway, turn(), **ONLY_WARM, **{"x-session-id": "s1"})
        assert await served(gateway, turn(*SAID, first="new words " + LONG), **{"x-session-id": "s1"}) == "warm"
        assert await served(gateway, turn(*SAID), **{"x-session-id": "s2"}) == "cold"
        assert await served(gateway, turn(*SAID)) == "cold", "the words were never said without a session"
        short = turn(*SAID, first="too short to be cached")
        await served(gateway, short, **ONLY_WARM)
        assert await served(gateway, short) == "cold"


THOUGHT = {
    "role": "assistant",
    "content": [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}, {"type": "text", "text": "So."}],
    "thinking_blocks": [{"type": "thinking", "signature": "c2ln"}],
}


@anyio
async def test_blocks_of_one_provider_are_left_out_for_another(upstream: FakeUpstream, tmp_path: Path) -> None:
    async with start(upstream, tmp_path / "home") as gateway:
        await served(gateway, turn(first="short"), **ONLY_WARM)
        again = turn(THOUGHT, {"role": "user", "content": "go on"}, first="short")
        assert await served(gateway, again, **ONLY_WARM) == "warm"
        assert json.loads(upstream.bodies[-1])["messages"] == again["messages"], "its own provider gets its own bytes"
        assert await served(gateway, again) == "cold"
        sent = json.loads(upstream.bodies[-1])["messages"]
        assert sent[1] == {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
        assert [sent[0], sent[2]] == [again["messages"][0], again["messages"][2]]


@anyio
async def test_a_conversation_keeps_the_provider_that_can_read_it(upstream: FakeUpstream, tmp_path: Path) -> None:
    async with start(upstream, tmp_path / "home", "keep") as gateway:
        await served(gateway, turn(first="short"), **ONLY_WARM)
        again = turn(THOUGHT, {"role": "user", "content": "go on"}, first="short")
        assert await served(gateway, again) == "warm"
        told = json.loads((await gateway.rows())[0]["decision"])
        reasons = {candidate["model"]: candidate.get("rejected", "") for candidate in told["candidates"]}
        assert reasons["cold"] == "the conversation holds blocks that only one can read"
        assert await served(gateway, turn(*SAID, first="short")) == "cold", "without such blocks it is free to go"


def conversation(model: str = "warm", tokens: int = 2000, at_ms: int = 0) -> Conversation:
    return Conversation(model, "one", {model: Prefix(tokens, at_ms)}, {"warm": 0.5})


@given(st.integers(0, 5000), st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_prefix_is_held_as_long_as_its_provider_holds_it(tokens: int, later_ms: int, ttl_ms: int) -> None:
    found = conversation(tokens=tokens).cached_tokens(later_ms, ttl_ms)
    assert found == ({"warm": tokens} if tokens >= 1024 and later_ms <= ttl_ms else {})


@anyio
async def test_the_table_forgets_whoever_was_quiet_for_longest() -> None:
    table = MemorySessions(limit=3)
    for name in (b"a", b"b", b"c", b"a", b"d"):
        await table.put(name, conversation())
    assert [await table.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert len(table) == 3


@anyio
async def test_workers_share_what_they_know_and_each_knows_its_own_when_redis_is_away(redis_url: str) -> None:
    links = [RedisLink(redis_url, lambda up: None, timeout_s=30) for _ in range(2)]
    try:
        first, second = (SharedSessions(link) for link in links)
        await first.put(b"shared-key", conversation())
        assert await second.get(b"shared-key") == conversation()
        assert await second.get(b"unknown-key") is None
    finally:
        for link in links:
            await link.close()
    away = RedisLink("redis://127.0.0.1:9/0", lambda up: None)
    try:
        alone = SharedSessions(away)
        await alone.put(b"shared-key", conversation("cold"))
        assert await alone.get(b"shared-key") == conversation("cold")
    finally:
        await away.close()


@anyio
async def test_two_workers_go_on_with_one_conversation(upstream: FakeUpstream, redis_url: str, tmp_path: Path) -> None:
    """Two gateways with one secret and one Redis, as workers are."""
    async with start(upstream, tmp_path / "one", redis_url=redis_url) as first:
        (tmp_path / "two").mkdir(mode=0o700)
        shutil.copy2(tmp_path / "one" / "pepper", tmp_path / "two" / "pepper")
        async with start(upstream, tmp_path / "two", redis_url=redis_url) as second:
            for gateway in (first, second):
                gateway.app.state.redis.timeout_s = 30
                await until(lambda link=gateway.app.state.redis: link.up)  # type: ignore[misc]  # a lambda's default
            words = "shared " + LONG
            assert await served(first, turn(first=words), **ONLY_WARM) == "warm"
            assert await served(second, turn(*SAID, first=words)) == "warm"
