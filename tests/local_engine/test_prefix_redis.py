"""The Redis tier, on a real Redis."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from local_engine.prefix import PrefixStore
from local_engine.prefix_redis import PREFIX, RedisTier, _key
from local_engine.prefix_tiers import SlowTiers
from tests.conftest import free_port, start_redis, stop
from tests.local_engine.prefix_harness import BLOCK, IDENTITY, commit, matched, new_store

A, B = b"tenant a", b"tenant b"
PROMPT = list(range(13))
AMPLE_S = 60.0


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that a busy machine keeps waiting is not one that is down."""
    monkeypatch.setattr("local_engine.prefix_redis.TIMEOUT_S", AMPLE_S)


@pytest.fixture
def client(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client
        client.flushdb()


@pytest.fixture
def start_store(redis_url: str) -> Iterator[Callable[..., PrefixStore]]:
    """A store of an engine of its own, which shares Redis with the others."""
    started: list[SlowTiers] = []

    def start(url: str = redis_url, *, ttl_s: int = 600, value_bytes_limit: int = 1 << 20) -> PrefixStore:
        tier = RedisTier(url, ttl_s=ttl_s, value_bytes_limit=value_bytes_limit)
        started.append(SlowTiers([tier], wait_s=AMPLE_S))
        return new_store(slow=started[-1])

    yield start
    for slow in started:
        slow.close(AMPLE_S)


def flush(store: PrefixStore) -> None:
    assert store.slow is not None
    assert store.slow.flush(AMPLE_S)


def fetched(store: PrefixStore, salt: bytes, tokens: list[int]) -> int:
    fetch = store.prefetch(salt, tokens)
    if fetch is not None:
        fetch.wait()
    count = matched(store, salt, tokens)
    assert store.problems() == []
    return count


def test_engines_share_prefixes_of_one_tenant(client: "redis.Redis", start_store: Callable[..., PrefixStore]) -> None:
    first, second = start_store(), start_store()
    commit(first, A, PROMPT, taps=True)
    flush(first)
    assert fetched(second, B, PROMPT) == 0
    assert fetched(second, A, PROMPT) == 12
    with second.lookup(A, PROMPT, taps=True) as match:
        assert match.tokens == 12
    keys = client.keys("*")
    assert len(keys) == 3
    assert all(isinstance(key, bytes) and key.startswith(PREFIX) for key in keys)
    assert all(A not in key for key in keys)


def test_a_long_prefix_is_read_in_several_batches(
    client: "redis.Redis", start_store: Callable[..., PrefixStore]
) -> None:
    prompt = list(range(200))
    store = start_store()
    commit(store, A, prompt)
    flush(store)
    assert fetched(start_store(), A, prompt) == 196


def test_blocks_live_for_their_time_and_use_renews_it(
    client: "redis.Redis", start_store: Callable[..., PrefixStore]
) -> None:
    store = start_store()
    commit(store, A, PROMPT)
    flush(store)
    keys = client.keys("*")
    for key in keys:
        assert 0 < client.ttl(key) <= 600
        client.expire(key, 100)
    other = start_store()
    assert fetched(other, A, PROMPT) == 12
    commit(other, A, PROMPT)
    flush(other)
    assert other.stats().tiers[0].written_blocks == 0
    assert all(client.ttl(key) > 100 for key in keys)
    client.delete(*keys)
    third = start_store()
    commit(third, A, PROMPT)  # in memory it is new: what is not there is written
    flush(third)
    assert sorted(client.keys("*")) == sorted(keys)


def test_values_that_are_too_large_are_not_sent(client: "redis.Redis", start_store: Callable[..., PrefixStore]) -> None:
    store = start_store(value_bytes_limit=100)
    commit(store, A, PROMPT)
    flush(store)
    assert client.keys("*") == []


def test_what_is_not_a_block_is_removed_and_missed(
    client: "redis.Redis", start_store: Callable[..., PrefixStore]
) -> None:
    store = start_store()
    commit(store, A, PROMPT[:8])
    flush(store)
    for key in client.keys("*"):
        client.set(key, b"junk")
    assert fetched(start_store(), A, PROMPT) == 0
    assert len(client.keys("*")) == 1


def test_evicting_reaches_redis(client: "redis.Redis", start_store: Callable[..., PrefixStore]) -> None:
    store = start_store()
    commit(store, A, PROMPT)
    commit(store, B, PROMPT)
    store.evict(A)
    store.evict(B, PROMPT[:12])
    flush(store)
    assert client.keys("*") == []
    commit(store, A, PROMPT)
    flush(store)
    assert len(client.keys("*")) == 3


def test_a_redis_that_dies_costs_misses_and_one_line(
    tmp_path: Path, start_store: Callable[..., PrefixStore], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "local_engine")
    port = free_port()
    process = start_redis(tmp_path, port)
    store = start_store(f"redis://127.0.0.1:{port}/0")
    try:
        commit(store, A, PROMPT)
        flush(store)
    finally:
        stop(process)
    for turn in range(3):
        commit(store, A, [turn] * 8)
        flush(store)
        assert matched(store, A, [turn] * 9) == 8
        assert fetched(store, B, PROMPT) == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("prefix tier redis is left alone for a while: ")
    assert store.stats().tiers[0].failures >= 1


@pytest.mark.parametrize("lost", ["all", "an end", "a beginning"])
def test_what_redis_lost_is_written_again(
    lost: str, client: "redis.Redis", start_store: Callable[..., PrefixStore]
) -> None:
    prompt = list(range(161))
    store = start_store()
    commit(store, A, prompt)
    flush(store)
    with store.lookup(A, prompt) as match:
        keys = [_key(IDENTITY.root(A, BLOCK), block.digest) for block in match.blocks]
    assert client.exists(*keys) == len(keys) == 40
    gone = {"all": keys, "an end": keys[20:], "a beginning": keys[:1]}[lost]
    client.delete(*gone)
    left = 0 if lost != "an end" else 80
    assert fetched(new_store(slow=store.slow), A, prompt) == left
    commit(store, A, prompt)
    flush(store)
    assert client.exists(*keys) == 40
    assert fetched(new_store(slow=store.slow), A, prompt) == 160


def test_what_redis_lost_is_written_again_though_nobody_asked_for_it(
    client: "redis.Redis", start_store: Callable[..., PrefixStore]
) -> None:
    store = start_store()
    commit(store, A, PROMPT)
    flush(store)
    client.flushall()
    commit(store, A, PROMPT)
    flush(store)
    assert len(client.keys("*")) == 3


@pytest.mark.parametrize(
    "command",
    [lambda tier, root: tier.read(root, [b"d" * 32]), lambda tier, root: tier.forget(root, None)],
    ids=["read", "forget"],
)
def test_a_redis_that_was_down_is_asked_what_it_still_has(
    command: Callable[[RedisTier, bytes], object], tmp_path: Path
) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    store = new_store()
    commit(store, A, PROMPT)
    root = IDENTITY.root(A, BLOCK)
    tier, other = [RedisTier(url, ttl_s=600, value_bytes_limit=1 << 20) for _ in range(2)]
    with store.lookup(A, PROMPT) as match:
        process = start_redis(tmp_path, port)
        try:
            assert len(list(tier.keep(root, match.blocks, frozenset()))) == 3
            assert list(tier.keep(root, match.blocks, frozenset())) == []
        finally:
            stop(process)
        with pytest.raises(OSError, match="refused"):
            command(tier, root)
        process = start_redis(tmp_path, port)
        try:
            assert len(list(other.keep(root, match.blocks[:1], frozenset()))) == 1
            assert len(list(tier.keep(root, match.blocks, frozenset()))) == 2
        finally:
            stop(process)
            tier.close()
            other.close()


def test_a_missing_redis_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the redis package: pip install 'leadline\[server\]'"):
        RedisTier("redis://127.0.0.1", ttl_s=1, value_bytes_limit=1)
