"""What is evicted is found nowhere again: not in a tier that was away, nor in what was on its way from one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from local_engine.prefix import PrefixStore
from local_engine.prefix_block import Block
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_tiers import SlowTiers, Tier, _Watched
from tests.local_engine.prefix_harness import (
    AMPLE_S,
    Clock,
    GatedTier,
    commit,
    fetched,
    matched,
    new_store,
    stored_files,
)

A, B = b"tenant a", b"tenant b"
PROMPT = list(range(13))

StartTiers = Callable[..., SlowTiers]


@pytest.fixture
def start_tiers() -> Iterator[StartTiers]:
    started: list[SlowTiers] = []

    def start(tier: Tier, *, clock: Callable[[], float] = Clock()) -> SlowTiers:
        started.append(SlowTiers([tier], wait_s=AMPLE_S, clock=clock))
        return started[-1]

    yield start
    for slow in started:
        slow.close(AMPLE_S)


class FlakyDisk(DiskTier):
    """Fails when told. Remembers what it was asked to forget and could."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 1 << 20)
        self.failing = False
        self.forgot: list[Sequence[bytes] | None] = []

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        if self.failing:
            raise OSError("no space left on device")
        return super().keep(root, path, rewrite)

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        if self.failing:
            raise OSError("no space left on device")
        super().forget(root, digests)
        self.forgot.append(digests)


def left_alone(folder: Path, slow: SlowTiers, tier: FlakyDisk) -> None:
    """Both tenants' prompts are stored, then the tier fails."""
    store = new_store(slow=slow)
    for salt in (A, B):
        commit(store, salt, PROMPT)
    assert slow.flush(AMPLE_S)
    assert len(stored_files(folder)) == 6
    tier.failing = True
    commit(store, B, [7] * 8)
    assert slow.flush(AMPLE_S)
    assert slow.stats()[0].failures == 1
    tier.failing = False


def back_after_an_eviction(folder: Path, start_tiers: StartTiers) -> tuple[SlowTiers, PrefixStore]:
    """A tier that was away while tenant A was evicted, and nobody has used since."""
    clock, tier = Clock(), FlakyDisk(folder)
    slow = start_tiers(tier, clock=clock)
    left_alone(folder, slow, tier)
    assert slow.stats()[0].away
    store = new_store(slow=slow)
    store.evict(A)
    assert not slow.flush(0.1), "the tier is still to forget it"
    clock.now += 2
    return slow, store


def test_a_tier_that_was_away_forgets_before_it_is_read(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow, store = back_after_an_eviction(tmp_path, start_tiers)
    assert fetched(store, A, PROMPT) == 0
    assert fetched(store, B, PROMPT) == 12
    assert slow.flush(AMPLE_S)
    assert len(stored_files(tmp_path)) == 3


def test_a_tier_that_was_away_forgets_before_it_is_written(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow, store = back_after_an_eviction(tmp_path, start_tiers)
    commit(store, A, PROMPT[:8])
    assert slow.flush(AMPLE_S)
    assert len(stored_files(tmp_path)) == 5
    assert fetched(new_store(slow=slow), A, PROMPT) == 8


def test_a_tier_that_comes_back_forgets_though_nobody_uses_it(tmp_path: Path) -> None:
    tier = FlakyDisk(tmp_path)
    slow = SlowTiers([tier])
    left_alone(tmp_path, slow, tier)
    new_store(slow=slow).evict(A)
    assert slow.flush(AMPLE_S)
    assert len(stored_files(tmp_path)) == 3
    slow.close(AMPLE_S)


def test_a_tier_that_fails_to_forget_tries_again(tmp_path: Path) -> None:
    tier = FlakyDisk(tmp_path)
    slow = SlowTiers([tier])
    store = new_store(slow=slow)
    commit(store, A, PROMPT)
    assert slow.flush(AMPLE_S)
    tier.failing = True
    store.evict(A)
    assert not slow.flush(0.1)
    tier.failing = False
    assert slow.flush(AMPLE_S)
    assert stored_files(tmp_path) == []
    slow.close(AMPLE_S)


def test_what_a_tier_owes_is_put_together_and_bounded(tmp_path: Path) -> None:
    tier = FlakyDisk(tmp_path)
    watched = _Watched(tier, Clock())
    for number in range(100):
        watched.owe(b"r" * 32, [number.to_bytes(32, "big"), b"d" * 32])
    watched.settle()
    assert [len(digests or ()) for digests in tier.forgot] == [101]
    for number in range(5000):
        watched.owe(b"r" * 32, [number.to_bytes(32, "big")])
    watched.settle()
    assert tier.forgot[1:] == [None], "too many to be remembered: all that the tenant has"
    assert watched.owed == {}


def test_closing_makes_a_tier_that_is_away_forget(tmp_path: Path, start_tiers: StartTiers) -> None:
    tier = FlakyDisk(tmp_path)
    slow = start_tiers(tier)
    left_alone(tmp_path, slow, tier)
    new_store(slow=slow).evict(A)
    slow.close(AMPLE_S)
    assert len(stored_files(tmp_path)) == 3


def test_closing_says_what_it_could_not_forget_in_time(
    start_tiers: StartTiers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "local_engine")
    tier = GatedTier()
    slow = start_tiers(tier)
    store = new_store(slow=slow)
    commit(store, A, PROMPT)
    assert tier.entered.wait(AMPLE_S)  # the worker is stuck in a write
    store.evict(A)
    commit(store, B, PROMPT)
    slow.close(0.01)
    assert caplog.messages == [
        "prefix tiers are closed before all was done: what was evicted last may still be in them"
    ]
    tier.gate.set()
    slow.close(AMPLE_S)
    assert tier.calls == ["write", "forget"], "what is not written in time is dropped, what is evicted is not"
    assert tier.blocks == {}


def test_what_is_evicted_is_not_fetched_while_the_tiers_are_still_to_forget_it(start_tiers: StartTiers) -> None:
    tier = GatedTier()
    tier.gate.set()
    slow = start_tiers(tier)
    store = new_store(slow=slow)
    commit(store, A, PROMPT)
    assert slow.flush(AMPLE_S)
    tier.gate.clear()
    tier.entered.clear()
    commit(store, B, PROMPT)
    assert tier.entered.wait(AMPLE_S)  # the worker is stuck in a write
    store.evict(A)
    fetch = store.prefetch(A, PROMPT)
    assert fetch is not None
    tier.gate.set()
    fetch.wait()
    assert matched(store, A, PROMPT) == 0


def test_what_was_fetched_and_not_taken_in_is_evicted_too(tmp_path: Path, start_tiers: StartTiers) -> None:
    before = start_tiers(DiskTier(tmp_path, 1 << 20))
    for salt in (A, B):
        commit(new_store(slow=before), salt, PROMPT)
    before.close(AMPLE_S)
    slow = start_tiers(DiskTier(tmp_path, 1 << 20))
    store = new_store(slow=slow)
    for salt in (B, A):
        fetch = store.prefetch(salt, PROMPT)
        assert fetch is not None
        fetch.wait()
    store.evict(A)
    assert slow.flush(AMPLE_S)
    assert matched(store, B, PROMPT) == 12
    assert fetched(store, A, PROMPT) == 0
    assert store.stats().held_blocks == 0


@pytest.mark.parametrize("known", [0, 4], ids=["nothing", "a beginning"])
def test_what_is_still_on_its_way_to_an_evicted_tenant_is_dropped(known: int, start_tiers: StartTiers) -> None:
    tier = GatedTier()
    tier.gate.set()
    slow = start_tiers(tier)
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    store = new_store(slow=slow)
    commit(store, A, PROMPT[:known])
    assert slow.flush(AMPLE_S)
    tier.gate.clear()
    tier.entered.clear()
    fetch = store.prefetch(A, PROMPT)
    assert fetch is not None
    assert tier.entered.wait(AMPLE_S)  # the worker is stuck in the read
    assert store.evict(A) == known
    tier.gate.set()
    fetch.wait()
    assert fetch.loaded
    assert matched(store, A, PROMPT) == 0
    assert fetched(store, A, PROMPT) == 0
    assert store.stats().blocks == 0
