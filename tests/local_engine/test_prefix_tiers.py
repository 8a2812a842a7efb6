"""The tiers below memory: what they give is what was computed, or nothing, and no step waits on them."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from local_engine.prefix import PrefixStore
from local_engine.prefix_block import Block, Root
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_format import Unusable, Wanted, decode, encode
from local_engine.prefix_identity import KVIdentity
from local_engine.prefix_tiers import RETRY_S, SlowTiers, Tier
from tests.local_engine.prefix_harness import (
    AMPLE_S,
    BLOCK,
    IDENTITY,
    LAYOUT,
    Clock,
    GatedTier,
    commit,
    fetched,
    kv_of,
    matched,
    new_store,
    stored_files,
    taps_of,
)

A, B = b"tenant a", b"tenant b"
SYSTEM = list(range(100, 108))
PROMPT = [*SYSTEM, 1, 2, 3, 4, 5]
DiskSize = 1 << 20

StartTiers = Callable[..., SlowTiers]


@pytest.fixture
def start_tiers() -> Iterator[StartTiers]:
    started: list[SlowTiers] = []

    def start(*tiers: Tier, clock: Callable[[], float] = Clock(), queue_bytes: int = 1 << 20) -> SlowTiers:
        started.append(SlowTiers(tiers, wait_s=AMPLE_S, queue_bytes=queue_bytes, clock=clock))
        return started[-1]

    yield start
    for tiers in started:
        tiers.close(AMPLE_S)


def test_a_prefix_survives_a_restart_on_disk(tmp_path: Path, start_tiers: StartTiers) -> None:
    before = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=before), A, PROMPT)
    before.close(AMPLE_S)
    store = new_store(slow=start_tiers(DiskTier(tmp_path, DiskSize)))
    assert store.peek(A, PROMPT) == 0
    assert fetched(store, A, PROMPT) == 12
    assert store.prefetch(A, PROMPT) is None, "all of it is in memory now"
    stats = store.stats()
    assert stats.promoted_tokens == 12
    assert stats.tiers[0].read_blocks == 3
    assert fetched(store, B, PROMPT) == 0


def test_what_memory_evicts_comes_back_from_disk(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    store = new_store(blocks=3, slow=slow)
    commit(store, A, PROMPT)
    commit(store, A, [7] * 8)
    assert slow.flush(AMPLE_S)
    assert store.peek(A, PROMPT) == 4
    assert fetched(store, A, PROMPT) == 12


def test_hidden_states_survive_a_restart_even_if_they_came_later(tmp_path: Path, start_tiers: StartTiers) -> None:
    before = start_tiers(DiskTier(tmp_path, DiskSize))
    store = new_store(slow=before)
    commit(store, A, SYSTEM)
    commit(store, A, SYSTEM, taps=True)
    before.close(AMPLE_S)
    store = new_store(slow=start_tiers(DiskTier(tmp_path, DiskSize)))
    assert fetched(store, A, PROMPT) == 8
    with store.lookup(A, PROMPT, taps=True) as match:
        torch.testing.assert_close(match.tap_sum(), taps_of(A, SYSTEM).sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kv_is_the_same_to_the_bit_whatever_its_type(dtype: torch.dtype) -> None:
    layout = dataclasses.replace(LAYOUT, dtype=dtype)
    data = torch.randn(layout.shape(BLOCK)).to(dtype)
    block = Block(Root(A, b"r" * 32), b"tokens", data, None)
    wanted = Wanted(block.digest, block.parent.digest, block.tokens)
    loaded = decode(encode(block), wanted, layout, BLOCK)
    assert loaded.data.dtype == dtype
    assert torch.equal(loaded.data, data)


def test_any_changed_byte_and_any_other_length_is_told() -> None:
    block = Block(Root(A, b"r" * 32), b"tokens", torch.randn(LAYOUT.shape(BLOCK)), torch.ones(2, 3))
    wanted = Wanted(block.digest, block.parent.digest, block.tokens)
    raw = encode(block)
    assert decode(raw, wanted, LAYOUT, BLOCK).taps is not None
    for i in range(len(raw)):
        with pytest.raises(Unusable):
            decode(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :], wanted, LAYOUT, BLOCK)
        with pytest.raises(Unusable):
            decode(raw[:i], wanted, LAYOUT, BLOCK)
    for other in (
        dataclasses.replace(wanted, digest=b"d" * 32),
        dataclasses.replace(wanted, parent=b"p" * 32),
        dataclasses.replace(wanted, tokens=b"others"),
    ):
        with pytest.raises(Unusable, match="another block"):
            decode(raw, other, LAYOUT, BLOCK)
    with pytest.raises(Unusable, match="another block"):
        decode(raw, wanted, dataclasses.replace(LAYOUT, dtype=torch.int32), BLOCK)


@pytest.mark.parametrize("damage", ["torn", "emptied", "another's"])
def test_a_file_that_is_not_the_block_is_removed_and_missed(
    damage: str, tmp_path: Path, start_tiers: StartTiers, caplog: pytest.LogCaptureFixture
) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, SYSTEM)
    slow.close(AMPLE_S)
    first = min(stored_files(tmp_path), key=lambda file: -file.stat().st_mtime_ns)
    (second,) = set(stored_files(tmp_path)) - {first}
    first.write_bytes({"torn": first.read_bytes()[:-3], "emptied": b"", "another's": second.read_bytes()}[damage])
    store = new_store(slow=start_tiers(DiskTier(tmp_path, DiskSize)))
    assert fetched(store, A, PROMPT) == 0
    assert stored_files(tmp_path) == [second]
    assert store.stats().tiers[0].unusable_blocks == 1
    assert len(caplog.messages) == 1
    commit(store, A, SYSTEM)  # computed again, written again
    assert stored_after_flush(store, tmp_path) == 2


def stored_after_flush(store: PrefixStore, folder: Path) -> int:
    assert store.slow is not None
    assert store.slow.flush(AMPLE_S)
    return len(stored_files(folder))


def test_only_what_is_ours_is_touched_in_the_folder(tmp_path: Path, start_tiers: StartTiers) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, SYSTEM)
    slow.close(AMPLE_S)
    good = stored_files(tmp_path)
    unfinished, foreign = good[0].with_suffix(".123.tmp"), good[0].parents[1] / "notes"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (1, 1))
    foreign.write_bytes(b"?")
    DiskTier(tmp_path, DiskSize)
    assert stored_files(tmp_path) == good
    assert not foreign.exists()
    assert (tmp_path / "letter.txt").read_text() == "dear"
    assert {file.stat().st_mode & 0o777 for file in good} == {0o600}
    assert good[0].parents[1].stat().st_mode & 0o777 == 0o700


def test_the_disk_keeps_to_its_bytes_and_prefixes_lose_their_ends_first(
    tmp_path: Path, start_tiers: StartTiers
) -> None:
    one = len(encode(Block(Root(A, b"r" * 32), b"t" * 16, kv_of(A, [1, 2, 3, 4]).contiguous(), None)))
    slow = start_tiers(DiskTier(tmp_path, 6 * one))
    store = new_store(slow=slow)
    old, new = [[turn] * 12 + [0] for turn in (1, 2)]
    for tokens in (new, old):
        commit(store, A, tokens)
    slow.close(AMPLE_S)
    assert len(stored_files(tmp_path)) == 6

    slow = start_tiers(DiskTier(tmp_path, 4 * one))  # after a restart times on disk decide
    assert len(stored_files(tmp_path)) == 4
    store = new_store(slow=slow)
    assert fetched(store, A, old) == 12
    assert fetched(store, A, new) == 4

    commit(store, A, [3] * 8)
    assert stored_after_flush(store, tmp_path) == 4
    assert sum(file.stat().st_size for file in stored_files(tmp_path)) <= 4 * one


def test_the_disk_forgets_what_was_used_longest_ago_and_no_beginning_before_its_end(
    tmp_path: Path, start_tiers: StartTiers
) -> None:
    one = len(encode(Block(Root(A, b"r" * 32), b"t" * 16, kv_of(A, [1, 2, 3, 4]).contiguous(), None)))
    slow = start_tiers(DiskTier(tmp_path, 6 * one))
    old, new = [[turn] * 12 + [0] for turn in (1, 2)]
    store = new_store(slow=slow)
    for tokens in (old, new, old, [3] * 8):  # old is used again
        commit(store, A, tokens)
    assert stored_after_flush(store, tmp_path) == 6
    assert fetched(new_store(slow=slow), A, old) == 12
    assert fetched(new_store(slow=slow), A, new) == 4
    commit(store, A, [*new[:4], *range(8)])  # what it continues is the oldest of all
    assert stored_after_flush(store, tmp_path) == 6
    assert fetched(new_store(slow=slow), A, [*new[:4], *range(8), 0]) == 12
    commit(store, A, [4] * 40)
    assert stored_after_flush(store, tmp_path) == 6
    assert fetched(new_store(slow=slow), A, [4] * 41) == 24, "longer than the disk: its beginning is kept"


def test_use_is_remembered_on_disk(tmp_path: Path) -> None:
    """Times older than a minute are renewed when their prefix is used, beginnings younger than ends."""
    tier = DiskTier(tmp_path, DiskSize)
    store = new_store()
    commit(store, A, SYSTEM)
    root = IDENTITY.root(A, BLOCK)
    with store.lookup(A, PROMPT) as match:
        path = match.blocks
        assert len(list(tier.keep(root, path, frozenset()))) == 2
        for file in stored_files(tmp_path):
            os.utime(file, ns=(10**9, 10**9))
        tier = DiskTier(tmp_path, DiskSize)
        assert list(tier.keep(root, path, frozenset())) == []
        names = [f"{block.name.hex()}.kv" for block in path]
    by_age = sorted(stored_files(tmp_path), key=lambda file: file.stat().st_mtime_ns)
    assert [file.name for file in by_age] == names[::-1]
    assert by_age[0].stat().st_mtime_ns > 10**9


def test_files_that_vanish_are_misses(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    by_age = sorted(stored_files(tmp_path), key=lambda file: file.stat().st_mtime_ns)
    by_age[0].unlink()
    assert fetched(new_store(slow=slow), A, PROMPT) == 8


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(IDENTITY, model="n"),
        dataclasses.replace(IDENTITY, weights="v"),
        dataclasses.replace(IDENTITY, layout=dataclasses.replace(LAYOUT, dtype=torch.bfloat16)),
    ],
    ids=["model", "weights", "dtype"],
)
def test_other_models_find_nothing_in_the_same_folder(
    other: KVIdentity, tmp_path: Path, start_tiers: StartTiers
) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, SYSTEM)
    assert slow.flush(AMPLE_S)
    assert new_store(slow=slow, identity=other).prefetch(A, PROMPT) is None
    assert fetched(new_store(slow=slow), A, PROMPT) == 8


def test_a_tenant_that_is_evicted_is_gone_from_disk(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    store = new_store(slow=slow)
    for salt in (A, B):
        commit(store, salt, PROMPT)
    store.evict(A, PROMPT[:12])
    assert stored_after_flush(store, tmp_path) == 3
    commit(store, A, PROMPT)
    store.evict(A)
    assert stored_after_flush(store, tmp_path) == 3
    assert fetched(store, A, PROMPT) == 0
    assert fetched(store, B, PROMPT) == 12


def test_no_step_waits_on_a_slow_tier(start_tiers: StartTiers) -> None:
    tier = GatedTier()
    slow = start_tiers(tier)
    store = new_store(slow=slow)
    commit(store, A, SYSTEM)
    assert tier.entered.wait(AMPLE_S)  # the worker is stuck in a write from here on
    fetch = store.prefetch(A, PROMPT)
    assert fetch is not None
    assert not fetch.ready
    commit(store, A, PROMPT)
    assert matched(store, A, PROMPT) == 12
    assert store.evict(B) == 0
    tier.gate.set()
    fetch.wait()
    assert slow.flush(AMPLE_S)
    assert tier.calls[:3] == ["write", "read", "write"], "a fetch does not wait for what is to be written"
    assert matched(store, A, PROMPT) == 12
    assert store.problems() == []


def test_a_fetch_is_not_waited_for_longer_than_computing_takes(start_tiers: StartTiers) -> None:
    tier = GatedTier()
    slow = start_tiers(tier)
    store = new_store(slow=slow)
    commit(store, A, SYSTEM)
    assert tier.entered.wait(AMPLE_S)  # the worker is stuck in a write
    store.observe_prefill(1000, 1e-6)
    fetch = store.prefetch(A, PROMPT)
    assert fetch is not None
    fetch.wait()
    assert fetch.ready
    assert not fetch.finished
    tier.gate.set()
    assert slow.flush(AMPLE_S)
    assert tier.calls == ["write", "write"], "nor read when it is too late"


def test_small_steps_do_not_tell_what_a_token_costs(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    assert fetched(new_store(slow=slow), A, PROMPT) == 12
    store = new_store(slow=slow)
    store.observe_prefill(1, 1e-9)
    assert store.prefetch(A, PROMPT) is not None


def test_what_a_fetch_continues_is_not_evicted_meanwhile(start_tiers: StartTiers) -> None:
    tier = GatedTier()
    tier.gate.set()
    slow = start_tiers(tier)
    store = new_store(blocks=3, slow=slow)
    commit(store, A, PROMPT)
    assert slow.flush(AMPLE_S)
    commit(store, A, [7] * 4)
    assert store.peek(A, PROMPT) == 8
    tier.gate.clear()
    fetch = store.prefetch(A, PROMPT)
    assert fetch is not None
    commit(store, A, [8] * 12)
    assert store.peek(A, PROMPT) == 8
    tier.gate.set()
    fetch.wait()
    assert matched(store, A, PROMPT) == 12
    assert store.stats().held_blocks == 0
    assert store.problems() == []


def test_two_fetches_of_one_prefix_bring_it_once(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    store = new_store(slow=slow)
    first, second = store.prefetch(A, PROMPT), store.prefetch(A, PROMPT)
    assert first is not None
    assert second is not None
    first.wait()
    second.wait()
    assert matched(store, A, PROMPT) == 12
    assert store.stats().blocks == 3
    assert store.stats().promoted_tokens == 12
    assert store.problems() == []


def test_a_tier_is_read_only_where_that_is_quicker_than_computing(tmp_path: Path, start_tiers: StartTiers) -> None:
    clock = Clock()
    slow = start_tiers(DiskTier(tmp_path, DiskSize), clock=clock)
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    assert fetched(new_store(slow=slow), A, PROMPT) == 12  # and it is known what reading costs

    def asked(compute_s: float) -> bool:
        store = new_store(slow=slow)
        store.observe_prefill(100, 100 * compute_s)
        fetch = store.prefetch(A, PROMPT)
        assert slow.flush(AMPLE_S)
        return fetch is not None

    assert not asked(1e-9)
    assert asked(1e9)
    clock.now += RETRY_S + 1
    assert asked(1e-9), "a slow moment is not for ever"


def test_a_tier_that_does_not_pay_is_not_written_either(tmp_path: Path, start_tiers: StartTiers) -> None:
    slow = start_tiers(DiskTier(tmp_path, DiskSize))
    store = new_store(slow=slow)
    commit(store, A, SYSTEM)
    assert slow.flush(AMPLE_S)
    assert fetched(new_store(slow=slow), A, PROMPT) == 8
    store.observe_prefill(100, 1e-7)
    commit(store, A, [5] * 12)
    assert stored_after_flush(store, tmp_path) == 2


def test_a_tier_that_fails_costs_misses_and_one_line(start_tiers: StartTiers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock, tier = Clock(), GatedTier()
    tier.gate.set()
    tier.error = OSError("no space left on device")
    slow = start_tiers(tier, clock=clock)
    store = new_store(slow=slow)
    for turn in range(3):
        commit(store, A, [turn] * 8)
        assert slow.flush(AMPLE_S)
    assert tier.calls == ["write"]
    assert store.prefetch(A, PROMPT) is None, "it is left alone"
    clock.now += 1.5
    assert fetched(store, A, PROMPT) == 0
    assert caplog.messages == ["prefix tier gated is left alone for a while: no space left on device"]
    clock.now += 1.5
    assert store.prefetch(A, PROMPT) is None, "longer each time"
    clock.now += 1.5
    tier.error = None
    commit(store, A, PROMPT)
    assert slow.flush(AMPLE_S)
    assert caplog.messages[1:] == ["prefix tier gated is back"]
    assert fetched(new_store(slow=slow), A, PROMPT) == 12
    assert not store.stats().tiers[0].away


def test_what_a_tier_cannot_keep_up_with_is_dropped_and_written_at_its_next_use(start_tiers: StartTiers) -> None:
    tier = GatedTier()
    slow = start_tiers(tier, queue_bytes=3000)
    store = new_store(slow=slow)
    commit(store, A, SYSTEM)
    assert tier.entered.wait(AMPLE_S)
    commit(store, A, [5] * 8)
    assert slow.dropped_bytes > 2000
    tier.gate.set()
    assert slow.flush(AMPLE_S)
    assert len(tier.blocks) == 2
    commit(store, A, [5] * 8)
    assert slow.flush(AMPLE_S)
    assert fetched(new_store(slow=slow), A, [5] * 9) == 8


def test_what_one_tier_lacks_the_next_one_gives(tmp_path: Path, start_tiers: StartTiers) -> None:
    tier = GatedTier()
    tier.gate.set()
    slow = start_tiers(DiskTier(tmp_path, DiskSize), tier)
    commit(new_store(slow=slow), A, PROMPT)
    assert slow.flush(AMPLE_S)
    by_age = sorted(stored_files(tmp_path), key=lambda file: file.stat().st_mtime_ns)
    for file in by_age[:2]:
        file.unlink()
    store = new_store(slow=slow)
    assert fetched(store, A, PROMPT) == 12
    assert [tier.read_blocks for tier in store.stats().tiers] == [1, 2]
