"""The exact cache: right answers to the right tenant, and nothing else."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache.exact import NOT_IN_KEY, CachedAnswer, MemoryCache, cache_key, cache_secret, cacheable
from gateway.cache.redis import RedisCache
from gateway.edge.headers import read_headers
from gateway.redis_link import RedisLink
from gateway.upstream.gather import as_stream, gather
from tests.conftest import free_port, start_redis, stop
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio
SECRET = cache_secret(b"pepper")


@anyio
async def test_the_same_question_is_answered_once(gateway: Gateway, upstream: FakeUpstream) -> None:
    _, first, body = await gateway.chat(ask())
    _, second, again = await gateway.chat(ask())
    assert (first["x-leadline-cache"], second["x-leadline-cache"]) == ("miss", "hit")
    assert body == again
    assert len(upstream.bodies) == 1
    assert (second["x-leadline-cost-nanousd"], second["x-leadline-attempts"]) == ("0", "0")
    hit, miss = await gateway.rows()
    assert (hit["cost_nanousd"], hit["model_served"]) == (0, "cheap")
    assert hit["baseline_nanousd"] == miss["cost_nanousd"], "what the hit would have cost"


@anyio
@pytest.mark.parametrize("first_streams", [False, True])
async def test_an_answer_is_replayed_streamed_or_whole(
    gateway: Gateway, upstream: FakeUpstream, first_streams: bool
) -> None:
    body = ask(n=2)
    if first_streams:
        await gateway.stream(body)
        _, headers, whole = await gateway.chat(body)
    else:
        _, _, whole = await gateway.chat(body)
        _, headers, raw = await gateway.stream({**body, "stream_options": {"include_usage": True}})
        assert raw.endswith(b"data: [DONE]\n\n")
        chunks = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: {")]
        assert json.loads(chunks[-1])["leadline"]["cache"] == "hit"
        gathered = gather(chunks)
        assert gathered is not None
        assert json.loads(gathered)["choices"] == whole["choices"]
        assert json.loads(gathered)["usage"] == whole["usage"]
    assert headers["x-leadline-cache"] == "hit"
    assert [c["message"]["content"].split()[-1] for c in whole["choices"]] == ["w11", "w11"]
    assert len(upstream.bodies) == 1


@anyio
async def test_a_tenant_never_sees_anothers_answer(gateway: Gateway, upstream: FakeUpstream) -> None:
    await gateway.chat(ask())
    other = gateway.app.state.lifecycle.keys.create("other", tenant="elsewhere")
    _, headers, _ = await gateway.chat(ask(), Authorization=f"Bearer {other}")
    assert headers["x-leadline-cache"] == "miss"
    assert len(upstream.bodies) == 2


@anyio
@pytest.mark.parametrize(
    ("fields", "headers", "state"),
    [
        ({"temperature": 0.7}, {}, "off"),
        ({}, {"Cache-Control": "no-store"}, "off"),
        ({}, {"Cache-Control": "max-age=0, No-Store"}, "off"),
        ({}, {"Cache-Control": "no-cache"}, "miss"),
        ({}, {"Cache-Control": "NO-CACHE"}, "miss"),
        ({"model": "uncached"}, {}, "off"),
        ({"temperature": 0}, {}, "hit"),
        ({"temperature": 0.7, "seed": 1}, {}, "hit"),
        ({"temperature": 0.7, "seed": None}, {}, "off"),
    ],
)
async def test_who_is_not_served_from_the_cache(
    gateway: Gateway, fields: dict[str, object], headers: dict[str, str], state: str
) -> None:
    for _ in range(2):
        _, answered, _ = await gateway.chat({**ask(), **fields}, **headers)
    assert answered["x-leadline-cache"] == state


@pytest.mark.parametrize("order", [1, -1])
def test_several_cache_control_headers_count_together(order: int) -> None:
    sent = [(b"cache-control", b"No-Store"), (b"cache-control", b"max-age=0")][::order]
    read = read_headers(sent)
    assert (read.no_cache, read.no_store) == (True, True)


@anyio
async def test_a_caller_can_replace_an_answer_that_was_kept(gateway: Gateway, upstream: FakeUpstream) -> None:
    _, _, first = await gateway.chat(ask())
    upstream.words = 5
    _, _, anew = await gateway.chat(ask(), **{"Cache-Control": "no-cache"})
    _, headers, kept = await gateway.chat(ask())
    assert headers["x-leadline-cache"] == "hit"
    assert kept["choices"] == anew["choices"] != first["choices"]


@anyio
@pytest.mark.parametrize("fault", [fake.status(500), fake.invalid_json, fake.cut_stream], ids=["500", "json", "cut"])
async def test_only_complete_answers_are_kept(gateway: Gateway, upstream: FakeUpstream, fault: fake.Fault) -> None:
    upstream.faults = [fault, fault]
    await (gateway.stream(ask()) if fault is fake.cut_stream else gateway.chat(ask()))
    upstream.faults = []
    _, headers, _ = await gateway.chat(ask())
    assert headers["x-leadline-cache"] == "miss"


FIELDS = st.dictionaries(
    st.sampled_from(["model", "messages", "tools", "temperature", "seed", "stop", "n", "response_format", "x"]),
    st.sampled_from([b"1", b"2", b'"a"', b'"b"', b"[]", b"null", b"{}"]).map(msgspec.Raw),
)
NAMES = st.sampled_from(["a", "b", "ab", ""])


@given(FIELDS, FIELDS, st.tuples(NAMES, NAMES, NAMES), st.tuples(NAMES, NAMES, NAMES))
def test_keys_are_equal_only_for_equal_requests(
    one: dict[str, msgspec.Raw], two: dict[str, msgspec.Raw], who: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    def key(fields: dict[str, msgspec.Raw], who: tuple[str, str, str]) -> bytes:
        return cache_key(SECRET, tenant=who[0], policy_version=who[1], route=who[2], fields=fields)

    same = {n: bytes(v) for n, v in one.items()} == {n: bytes(v) for n, v in two.items()} and who == other
    assert (key(one, who) == key(two, other)) == same


def test_fields_that_change_no_answer_are_not_in_the_key() -> None:
    bare = {"model": msgspec.Raw(b'"m"')}
    noisy = {**bare, **{name: msgspec.Raw(b"true") for name in NOT_IN_KEY}}
    keys = [cache_key(SECRET, tenant="t", policy_version="v", route="r", fields=fields) for fields in (bare, noisy)]
    assert keys[0] == keys[1]


@given(st.dictionaries(st.sampled_from(["temperature", "seed"]), st.sampled_from([b"0", b"0.0", b"1", b"null", b"[]"])))
def test_chance_is_not_cached(raw: dict[str, bytes]) -> None:
    temperature = raw.get("temperature", b"0")
    asks_for_chance = temperature == b"1" and raw.get("seed", b"null") == b"null"
    unreadable = temperature == b"[]"
    assert cacheable({n: msgspec.Raw(v) for n, v in raw.items()}) == (not asks_for_chance and not unreadable)


@anyio
async def test_memory_is_bounded_and_entries_expire() -> None:
    now = 0.0
    cache = MemoryCache(10_000, clock=lambda: now)
    for i in range(100):
        await cache.put(bytes([i]), CachedAnswer(b"x" * 500, "m", "p"), ttl_s=10)
    assert cache.statistics()["bytes"] <= 10_000
    assert await cache.get(bytes([0])) is None, "the least recently used went first"
    assert await cache.get(bytes([99])) is not None
    now = 11.0
    assert await cache.get(bytes([99])) is None


async def patient(gateway: Gateway) -> None:
    """A busy machine is not a Redis that is away."""
    cache = gateway.app.state.lifecycle._cache
    assert isinstance(cache, RedisCache)
    cache._link.timeout_s = 30
    await until(lambda: cache._link.up)


@anyio
async def test_redis_serves_all_workers_and_tenants_stay_apart(
    start_gateway: StartGateway, upstream: FakeUpstream, redis_url: str, tmp_path: Path
) -> None:
    async with start_gateway(redis_url=redis_url) as one:
        await patient(one)
        await one.chat(ask("through redis"))
        pepper = (tmp_path / "home" / "pepper").read_bytes()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "pepper").write_bytes(pepper)
    async with start_gateway(redis_url=redis_url, home=tmp_path / "second") as two:
        await patient(two)
        _, headers, _ = await two.chat(ask("through redis"))
    assert headers["x-leadline-cache"] == "hit"
    assert len(upstream.bodies) == 1


@anyio
async def test_a_redis_that_dies_costs_no_request(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    port = free_port()
    server = await asyncio.to_thread(start_redis, tmp_path, port)
    async with start_gateway(redis_url=f"redis://127.0.0.1:{port}/0") as gateway:
        await patient(gateway)
        await gateway.chat(ask())
        assert (await gateway.chat(ask()))[1]["x-leadline-cache"] == "hit"
        await asyncio.to_thread(stop, server)
        for _ in range(3):
            status, headers, _ = await gateway.chat(ask())
            assert (status, headers["x-leadline-cache"]) == (200, "miss")


@anyio
async def test_a_redis_that_hangs_is_left_alone(tmp_path: Path) -> None:
    met: list[asyncio.StreamWriter] = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.append(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = RedisLink(f"redis://127.0.0.1:{port}/0", lambda up: None, open_s=3600)
    cache = RedisCache(link)
    assert await cache.get(b"k") is None
    connections = len(met)
    for _ in range(1000):
        assert await cache.get(b"k") is None
    assert len(met) == connections, "while it is away it is not asked"
    await link.close()
    server.close()
    await server.wait_closed()


@anyio
async def test_what_many_requests_ask_of_redis_at_once_is_one_round_trip(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.redis_link.CONNECT_TIMEOUT_S", 30)
    link = RedisLink(redis_url, lambda up: None, timeout_s=30)
    assert await link.check()
    cache = RedisCache(link)
    trips = 0
    call = link.call

    async def counted(ask: Any, *, waited_s: float = 0.0) -> Any:
        nonlocal trips
        trips += 1
        return await call(ask, waited_s=waited_s)

    link.call = counted  # type: ignore[method-assign]
    answers = [CachedAnswer(f"{i}".encode(), "m", "p") for i in range(20)]
    await asyncio.gather(*(cache.put(b"k%d" % i, answer, 60.0) for i, answer in enumerate(answers)))
    leaving = asyncio.create_task(cache.get(b"k0"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await asyncio.gather(*(cache.get(b"k%d" % i) for i in range(21))) == [*answers, None]
    assert trips == 2
    await link.close()


def test_tool_calls_survive_the_round_trip() -> None:
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    whole = {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": {"prompt_tokens": 1},
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
    }  # fmt: skip
    chunks = as_stream(json.dumps(whole).encode())
    gathered = gather(chunks)
    assert gathered is not None
    assert json.loads(gathered) == whole
