"""Engines behind one provider: prefixes and tenants, loads, replicas that are away, cached tokens, aborts."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream import fleet
from gateway.upstream.affinity import PrefixIndex, block_keys
from gateway.upstream.connection import Timeouts
from gateway.upstream.engines import Load, load_of_body, load_of_header
from gateway.upstream.fleet import FULL_KV, LOAD_AGE_S, Fleet
from routers.policy import Server
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_engines import FakeEngine, engine

POLICY = """
version: 1
providers:
  gpus: {{server: {server}, base_url: "{first}", {replicas} timeout: 20s, retries: 0, breaker: off}}
models:
  big: {{provider: gpus, model: big, context: 100000, max_output: 100, price: free}}
routes:
  - {{name: auto, when: {{model: auto}}, use: [big], cache: off}}
"""
SERVERS: list[Server] = ["vllm", "sglang", "llamacpp"]
anyio = pytest.mark.anyio


def conversation(seed: str, turns: int = 1) -> dict[str, Any]:
    said = [
        {"role": "user" if turn % 2 == 0 else "assistant", "content": f"{seed} {turn} " * 60} for turn in range(turns)
    ]
    return {"model": "auto", "messages": [{"role": "system", "content": f"rules of {seed} " * 40}, *said]}


class Engines:
    def __init__(self, gateway: Gateway, servers: list[FakeEngine]) -> None:
        self.gateway, self.servers = gateway, servers

    @property
    def fleet(self) -> Fleet:
        found = self.gateway.app.state.lifecycle.world.upstreams["gpus"]
        assert isinstance(found, Fleet)
        return found

    async def served_by(self, body: dict[str, Any], **headers: str) -> int:
        before = [len(server.bodies) for server in self.servers]
        status, _, answer = await self.gateway.chat(body, **headers)
        assert status == 200, answer
        (at,) = [i for i, server in enumerate(self.servers) if len(server.bodies) > before[i]]
        return at


@pytest.fixture(params=SERVERS)
async def engines(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(engine(request.param)) for _ in range(3)]
        urls = ", ".join(f'"{server.url}"' for server in servers[1:])
        taken = "priority_scheduling: true," if request.param == "vllm" else ""
        policy = POLICY.format(server=request.param, first=servers[0].url, replicas=f"replicas: [{urls}], {taken}")
        gateway = await stack.enter_async_context(running(policy, tmp_path / "home"))
        yield Engines(gateway, servers)


@anyio
async def test_a_conversation_stays_where_its_prefix_is(engines: Engines) -> None:
    first = {seed: await engines.served_by(conversation(seed)) for seed in "abcdef"}
    assert set(first.values()) == {0, 1, 2}, "new conversations are spread"
    for turns in (3, 5):
        for seed, at in first.items():
            assert await engines.served_by(conversation(seed, turns)) == at
    rows = await engines.gateway.rows()
    cached = [row["cached_input_tokens"] for row in rows]
    assert sum(count > 500 for count in cached) == 12, "what the engines had is read as cached"
    assert all(row["cached_input_tokens"] + row["input_tokens"] > 0 for row in rows)


@anyio
async def test_a_short_conversation_stays_too(engines: Engines) -> None:
    said: list[dict[str, str]] = [{"role": "system", "content": "You are a careful calculator."}]
    for seed in "abc":
        messages = [*said, {"role": "user", "content": f"{seed} asks: what is 23 + 48 - 7, in words, if you please?"}]
        at = await engines.served_by({"model": "auto", "messages": messages})
        messages += [{"role": "assistant", "content": "64"}, {"role": "user", "content": "And 5 more?"}]
        assert await engines.served_by({"model": "auto", "messages": messages}) == at


@anyio
async def test_a_busy_replica_gives_a_conversation_up(engines: Engines) -> None:
    at = await engines.served_by(conversation("a"))
    assert await engines.served_by(conversation("a", 3)) == at
    for server in engines.servers:
        server.hold.clear()
    held = [asyncio.create_task(engines.gateway.chat(conversation("a", 3))) for _ in range(6)]
    await until(lambda: sum(server.running for server in engines.servers) == 6)
    assert [replica.in_flight for replica in engines.fleet.replicas] == [server.running for server in engines.servers]
    assert 1 <= max(server.running for server in engines.servers) <= 4, "not all wait for the one that has the prefix"
    assert engines.servers[at].running >= 2
    for server in engines.servers:
        server.hold.set()
    assert {(await task)[0] for task in held} == {200}
    assert [replica.in_flight for replica in engines.fleet.replicas] == [0, 0, 0]


@anyio
async def test_what_an_engine_says_of_its_load_counts(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    at = await engines.served_by(conversation("a"))
    engines.servers[at].waiting = 8  # others use it, too
    replica = engines.fleet.replicas[at]
    async with asyncio.timeout(20):
        while replica.told.requests < 7:
            await engines.gateway.chat(conversation("a"))
            await asyncio.sleep(0.05)
    monkeypatch.setattr(fleet, "LOAD_AGE_S", 60.0)  # it is not to grow old on a busy machine
    assert await engines.served_by(conversation("a", 3)) != at


@anyio
async def test_a_conversation_leaves_a_replica_whose_kv_is_full_unless_all_are(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = await engines.served_by(conversation("a"))
    replica = engines.fleet.replicas[at]
    for server in engines.servers:
        server.kv = 0.8
    await asyncio.sleep(LOAD_AGE_S)
    for _ in range(4):
        assert await engines.served_by(conversation("a")) == at, "a KV that is in use keeps its prefixes"
    if engines.servers[at].kind == "llamacpp":
        assert replica.told.kv == 0, "it does not say"
        return
    engines.servers[at].kv = 0.97
    async with asyncio.timeout(20):
        while replica.told.kv < FULL_KV:
            await engines.gateway.chat(conversation("a"))
            await asyncio.sleep(0.05)
    monkeypatch.setattr(fleet, "LOAD_AGE_S", 60.0)
    assert await engines.served_by(conversation("a", 3)) != at
    for server, other in zip(engines.servers, engines.fleet.replicas, strict=True):
        server.kv = 0.97
        other.told, other.told_at = Load(kv=0.97), time.monotonic()
    first = await engines.served_by(conversation("b"))
    assert await engines.served_by(conversation("b", 3)) == first, "where all are full, the prefix decides"


@anyio
async def test_a_replica_that_is_away_costs_no_request(engines: Engines) -> None:
    fleet = engines.fleet
    at = await engines.served_by(conversation("a"))
    fleet.replicas[at].upstream._heads = {  # nobody listens there
        endpoint: type(head)("POST", "http://127.0.0.1:9/v1", [])
        for endpoint, head in fleet.replicas[at].upstream._heads.items()
    }
    served = {await engines.served_by(conversation("a", 3)) for _ in range(4)}
    assert at not in served
    assert fleet.replicas[at].failures >= 1
    rows = await engines.gateway.rows()
    assert {(row["outcome"], len(row["attempt_rows"])) for row in rows} == {("ok", 1)}


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_replica_without_its_engine_costs_no_request(engines: Engines, stream: bool) -> None:
    at = await engines.served_by(conversation("a"))
    engines.servers[at].starting = True
    request = engines.gateway.stream if stream else engines.gateway.chat
    for _ in range(4):
        assert (await request({**conversation("a", 3), "stream": stream}))[0] == 200
    assert len(engines.servers[at].bodies) > 1, "it was asked, in vain"
    rows = await engines.gateway.rows()
    assert {(row["outcome"], len(row["attempt_rows"])) for row in rows} == {("ok", 1)}
    assert [replica.in_flight for replica in engines.fleet.replicas] == [0, 0, 0]
    for server in engines.servers:
        server.starting = True
    status, _, answer = await engines.gateway.chat(conversation("a", 3))
    assert status in (502, 503)
    assert answer["error"]["message"].endswith("There is no engine.")
    assert not answer["error"]["message"].endswith("..")


@anyio
async def test_tenants_share_no_prefix_where_the_engine_has_salts(engines: Engines) -> None:
    other = engines.gateway.app.state.lifecycle.keys.create("other", tenant="elsewhere")
    body = {**conversation("a"), "cache_salt": "mine"}
    await engines.served_by(body)
    await engines.served_by(body, Authorization=f"Bearer {other}")
    salts = [sent.get("cache_salt") for server in engines.servers for sent in server.bodies]
    rows = await engines.gateway.rows()
    if engines.servers[0].kind == "llamacpp":
        assert salts == ["mine", "mine"], "it knows no salts: nothing is added"
    else:
        assert len(set(salts)) == 2
        assert "mine" not in salts, "no caller chooses whose prefixes it shares"
        assert [row["cached_input_tokens"] for row in rows] == [0, 0]


@anyio
@pytest.mark.parametrize("server", ["leadline", "vllm"])
async def test_our_own_engine_is_told_the_longest_answer_that_was_held(server: Server, tmp_path: Path) -> None:
    """It takes one that does not fit; others would refuse that, so there a policy's word is believed."""
    async with engine("vllm") as fake:
        policy = POLICY.format(server=server, first=fake.url, replicas="")
        async with running(policy, tmp_path / "home") as gateway:
            for asked in ({}, {"max_tokens": 30}):
                status, _, answer = await gateway.chat({**conversation("a"), **asked})
                assert status == 200, answer
        async with running(policy.replace("max_output: 100, ", ""), tmp_path / "unbounded") as gateway:
            await gateway.chat(conversation("a"))
    told = [body.get("max_tokens") for body in fake.bodies]
    assert told == [100 if server == "leadline" else None, 30, None], "without, its window is the bound"


@anyio
async def test_a_priority_is_told_in_the_words_of_each_server(engines: Engines) -> None:
    for server in engines.servers:
        server.priority_scheduling = True
    for body, header in (({"priority": -5}, {}), ({}, {"x-leadline-priority": "-5"}), ({"priority": 9}, {})):
        await engines.served_by({**conversation("a"), **body}, **header)
    sent = [body.get("priority") for server in engines.servers for body in server.bodies]
    told = {"vllm": 5, "sglang": -5, "llamacpp": None}[engines.servers[0].kind]
    assert sent == [told, told, None], "nothing is said of what is as all are; nobody raises itself"


@anyio
async def test_a_vllm_without_priority_scheduling_is_sent_none_by_callers_shadows_or_judges(tmp_path: Path) -> None:
    async with engine("vllm") as server:
        policy = POLICY.format(server="vllm", first=server.url, replicas="").replace(
            "  big:", "  other: {provider: gpus, model: other, price: free}\n  big:"
        ).replace("cache: off}", "cache: off, shadow: {models: [other], share: 100%, judge: big}}")  # fmt: skip
        async with running(policy, tmp_path / "home") as gateway:
            status, _, answer = await gateway.chat(conversation("a"), **{"x-leadline-priority": "-5"})
            assert status == 200, answer
            await until(lambda: gateway.app.state.lifecycle.shadows.statistics()["running"] == 0)
            rows = await gateway.rows()
    assert len(server.bodies) == 3, "the caller's, the shadow's, and one for a judge whose words are no verdict"
    outcomes = [(attempt["kind"], attempt["outcome"]) for row in rows for attempt in row["attempt_rows"]]
    assert sorted(outcomes) == [("first", "ok"), ("judge", "ok"), ("shadow", "ok")]
    assert [body.get("priority") for body in server.bodies] == [None] * 3


@anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_ends_the_generation(engines: Engines, stream: bool) -> None:
    at = await engines.served_by(conversation("a"))
    engines.servers[at].hold.clear()
    request = engines.gateway.stream if stream else engines.gateway.chat
    asked = asyncio.create_task(request({**conversation("a", 3), "stream": stream}))
    await until(lambda: engines.servers[at].running == 1)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    async with asyncio.timeout(20):
        await engines.servers[at].aborted.wait()
    await until(lambda: sum(replica.in_flight for replica in engines.fleet.replicas) == 0)


@anyio
async def test_streams_read_cached_tokens_too(engines: Engines) -> None:
    for _ in range(2):
        status, _, _ = await engines.gateway.stream(conversation("a"))
        assert status == 200
    first, second = sorted((await engines.gateway.rows()), key=lambda row: row["created_at_ms"])
    assert first["cached_input_tokens"] == 0
    assert second["cached_input_tokens"] > second["input_tokens"]
    assert first["input_tokens"] == second["input_tokens"] + second["cached_input_tokens"]
    assert [replica.in_flight for replica in engines.fleet.replicas] == [0, 0, 0]


@given(st.text(min_size=1, max_size=9000), st.integers(0, 9000), st.text(max_size=500))
def test_prompts_share_keys_exactly_as_far_as_they_are_equal(text: str, cut: int, other: str) -> None:
    one, two = text.encode() * 3, (text.encode() * 3)[:cut] + other.encode()
    keys, others = block_keys("t", [one]), block_keys("t", [two])
    common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    shared = sum(a == b for a, b in zip(keys, others, strict=False))
    assert shared >= sum(bound <= common for bound in [*range(64, 512, 64), *range(512, 4097, 256)])
    assert not set(block_keys("u", [one])) & set(keys), "tenants have keys of their own"


def test_the_index_forgets_the_oldest_and_the_restarted() -> None:
    index = PrefixIndex(max_blocks=4)
    index.saw([1, 2], 0)
    index.saw([1, 2, 3], 1)
    assert index.matched([1, 2, 3, 4], 2) == [0.5, 0.75]
    index.forget(1)
    assert index.matched([1, 2, 3, 4], 2) == [0.5, 0.0]
    index.saw([5, 6, 7, 8], 0)
    assert index.matched([1, 2], 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("said", "load"),
    [
        ('JSON {"named_metrics": {"num_requests_waiting": 3, "kv_cache_usage_perc": 0.5}}', Load(3.0, 0.5)),
        ('JSON {"named_metrics": {"num_requests_waiting": 3}}', Load(3.0)),
        ('JSON {"named_metrics": {}}', None), ("JSON {", None), ("TEXT a=1", None), ("", None), ("JSON []", None),
    ],
)  # fmt: skip
def test_a_load_header_that_cannot_be_read_is_none(said: str, load: Load | None) -> None:
    assert load_of_header(said) == load


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"loads":[{}]}', b'{"loads":3}', b'{"error":"slots are off"}'])
def test_a_load_that_cannot_be_read_is_none(body: bytes) -> None:
    assert load_of_body("sglang", body) is None
    assert load_of_body("llamacpp", body) is None


def test_a_load_is_read_from_what_a_load_path_answers() -> None:
    slots = [{"is_processing": True}, {"is_processing": False}]
    assert load_of_body("llamacpp", json.dumps(slots).encode()) == Load(1.0)
    ranks = [{"num_running_reqs": n, "num_waiting_reqs": 1, "token_usage": n / 10} for n in (9, 3)]
    assert load_of_body("sglang", json.dumps({"loads": ranks}).encode()) == Load(14.0, 0.3), "there is room in one"


@anyio
async def test_one_server_of_a_kind_needs_no_replicas(tmp_path: Path) -> None:
    async with engine("vllm") as server:
        policy = POLICY.format(server="vllm", first=server.url, replicas="")
        async with running(policy, tmp_path / "home") as gateway:
            assert (await gateway.chat(ask(model="big")))[0] == 200
    assert server.bodies[0]["cache_salt"]
    assert server.headers[0]["endpoint-load-metrics-format"] == "JSON"


@anyio
async def test_a_gateway_that_ends_asks_nobody_for_a_load_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LOAD_TIMEOUTS", Timeouts(60.0, 60.0, 60.0, 60.0))
    async with engine("sglang") as first, engine("sglang") as second:
        first.tells_load.clear()
        second.tells_load.clear()
        policy = POLICY.format(server="sglang", first=first.url, replicas=f'replicas: ["{second.url}"],')
        async with running(policy, tmp_path / "home") as gateway:
            assert (await gateway.chat(conversation("a")))[0] == 200
            await until(lambda: first.loads_asked == second.loads_asked == 1)
            replicas = Engines(gateway, [first, second]).fleet.replicas
            asking = [replica.asking for replica in replicas if replica.asking is not None]
            assert [task.done() for task in asking] == [False, False]
        assert [task.cancelled() for task in asking] == [True, True]
