import dataclasses
from functools import partial

import pytest
import torch

from local_engine.kv import KVShape
from local_engine.kv_rows import RowsKV
from local_engine.prefix import PrefixStore
from local_engine.prefix_block import Block
from local_engine.prefix_identity import KVIdentity, KVLayout, child_digest, token_bytes, weights_fingerprint
from local_engine.prefix_types import BlockRemoved, BlockStored, KVEvent
from tests.local_engine.prefix_harness import (
    BLOCK,
    IDENTITY,
    LAYOUT,
    Computed,
    commit,
    kv_of,
    matched,
    new_store,
    taps_of,
)

A, B = b"tenant a", b"tenant b"
SYSTEM = list(range(100, 108))  # two blocks


def test_one_shot_prompts_with_a_common_prefix_hit() -> None:
    store = new_store()
    commit(store, A, [*SYSTEM, 1, 2, 3])
    assert matched(store, A, [*SYSTEM, 4, 5, 6, 7, 8]) == len(SYSTEM)


def test_a_growing_chat_hits_all_full_blocks_of_its_last_turn() -> None:
    store = new_store()
    chat = list(range(30))
    for turn in (10, 17, 25):
        commit(store, A, chat[:turn])  # at the end of the prompt's prefill, and again with the answer
        assert matched(store, A, [*chat[:turn], 99]) == turn // BLOCK * BLOCK


@pytest.mark.parametrize(("length", "hit"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_left_to_compute(length: int, hit: int) -> None:
    store = new_store()
    commit(store, A, list(range(12)))
    assert matched(store, A, list(range(length))) == hit
    assert store.peek(A, list(range(length))) == hit


def test_a_tenant_never_hits_what_another_stored() -> None:
    store = new_store()
    commit(store, A, SYSTEM)
    assert matched(store, B, [*SYSTEM, 1]) == 0
    commit(store, B, SYSTEM)
    assert matched(store, B, [*SYSTEM, 1]) == matched(store, A, [*SYSTEM, 1]) == 8


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(IDENTITY, model="n"),
        dataclasses.replace(IDENTITY, weights="v"),
        dataclasses.replace(IDENTITY, adapter="french"),
        dataclasses.replace(IDENTITY, model="mw", weights=""),
        dataclasses.replace(IDENTITY, layout=dataclasses.replace(LAYOUT, dtype=torch.bfloat16)),
        dataclasses.replace(IDENTITY, layout=dataclasses.replace(LAYOUT, kv_heads=2)),
        dataclasses.replace(IDENTITY, layout=dataclasses.replace(LAYOUT, tap_layers=(1, 3))),
    ],
    ids=["model", "weights", "adapter", "fields run together", "dtype", "shape", "tapped layers"],
)
def test_whatever_can_change_the_values_changes_every_name(other: KVIdentity) -> None:
    assert other.root(A, BLOCK) != IDENTITY.root(A, BLOCK)
    assert IDENTITY.root(B, BLOCK) != IDENTITY.root(A, BLOCK) != IDENTITY.root(A, 2 * BLOCK)


def test_names_do_not_change_between_processes() -> None:
    root = KVIdentity(model="m", weights="w", layout=LAYOUT).root(A, BLOCK)
    name = child_digest(root, token_bytes([1, 2, 3, 4]))
    assert name.hex() == "173f7136c70bf219b49bbda2ec5825f3beac02d2ffdd8d38c64f3f110533c314"


def test_what_a_kv_cache_exports_can_be_stored_and_loaded_again() -> None:
    shape = KVShape(
        layers=2, query_heads=2, kv_heads=1, head_dim=2, context=64, dtype=torch.float32, device=torch.device("cpu")
    )
    assert KVLayout.of(shape, LAYOUT.tap_layers, LAYOUT.width) == LAYOUT
    kv = RowsKV(shape, 1 << 20)
    slot, other = kv.open(30), kv.open(30)
    tokens = list(range(30))
    kv.load(slot, 0, kv_of(A, tokens))
    store = new_store()
    assert store.commit(A, tokens, partial(kv.export_into, slot)) == 28
    with store.lookup(A, tokens) as match:
        match.load(kv, other)
    assert kv.length(other) == 28
    assert torch.equal(kv.export(other, 0, 28), kv_of(A, tokens[:28]))


def test_changed_weights_and_changed_configurations_are_told_apart() -> None:
    class Network(torch.nn.Linear):
        class Config:
            text = "{}"

            def to_json_string(self) -> str:
                return self.text

        config = Config()

    network = Network(3, 3)
    before = weights_fingerprint(network)
    assert weights_fingerprint(network) == before
    network.config.text = '{"rope_theta": 2}'
    assert weights_fingerprint(network) != before
    network.config.text = "{}"
    with torch.no_grad():
        network.weight[2, 2] += 1e-3
    assert weights_fingerprint(network) != before


def test_what_is_stored_is_not_copied_out_again() -> None:
    store = new_store()
    assert commit(store, A, list(range(10))) == [(0, 8)]
    assert commit(store, A, list(range(10))) == []
    assert commit(store, A, list(range(13))) == [(8, 12)]


def test_two_sequences_of_one_step_with_the_same_prompt_store_it_once() -> None:
    events: list[KVEvent] = []
    store = new_store(events=events)
    first, second = store.lookup(A, [*SYSTEM, 1]), store.lookup(A, [*SYSTEM, 1])
    assert first.tokens == second.tokens == 0
    commit(store, A, [*SYSTEM, 1])
    commit(store, A, [*SYSTEM, 1])
    first.close()
    second.close()
    assert store.stats().blocks == 2
    assert len(events) == 1
    assert store.evict(A) == 8
    assert matched(store, A, [*SYSTEM, 1]) == 0


def test_no_block_is_published_before_all_its_tokens_are_computed() -> None:
    """Under chunked prefill only what the chunks so far have covered is committed."""
    store = new_store()
    prompt = list(range(20))
    for computed in (3, 7, 15):
        commit(store, A, prompt[:computed])
        assert store.peek(A, prompt) == computed // BLOCK * BLOCK


def test_space_that_is_used_again_does_not_answer_for_what_was_there() -> None:
    store = new_store(blocks=2)
    commit(store, A, SYSTEM)
    for turn in range(5):
        commit(store, A, [turn] * 8)
        assert matched(store, A, [*SYSTEM, 1]) == 0
        assert matched(store, A, [turn] * 9) == 8


def test_equal_tokens_after_different_prefixes_are_different_blocks() -> None:
    store = new_store()
    commit(store, A, [1, 1, 1, 1, 9, 9, 9, 9])
    commit(store, A, [2, 2, 2, 2, 9, 9, 9, 9])
    assert matched(store, A, [2, 2, 2, 2, 9, 9, 9, 9, 5]) == 8
    assert matched(store, A, [9, 9, 9, 9, 5]) == 0


def test_where_all_names_collide_nothing_wrong_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local_engine.prefix_block.child_digest", lambda parent, tokens: b"same" * 8)
    store = new_store()
    commit(store, A, [1] * 8)
    assert matched(store, A, [2] * 9) == 0
    commit(store, A, [2] * 8)
    commit(store, A, [1, 1, 1, 1, 2, 2, 2, 2])
    for tokens in ([1] * 9, [2] * 9, [1, 1, 1, 1, 2, 2, 2, 2, 3]):
        assert matched(store, A, tokens) == 8
    assert matched(store, A, [2, 2, 2, 2, 1, 1, 1, 1, 3]) == 4


def test_the_least_recently_used_goes_first_and_leaves_before_what_they_continue() -> None:
    store = new_store(blocks=4)
    commit(store, A, [*SYSTEM, 1, 1, 1, 1])
    commit(store, A, [*SYSTEM, 2, 2, 2, 2])
    assert matched(store, A, [*SYSTEM, 1, 1, 1, 1, 0]) == 12  # 1 is used after 2
    commit(store, A, [3] * 4)
    assert store.peek(A, [*SYSTEM, 2, 2, 2, 2, 0]) == 8
    assert store.peek(A, [*SYSTEM, 1, 1, 1, 1, 0]) == 12
    commit(store, A, [4] * 8)
    assert store.peek(A, [*SYSTEM, 1, 1, 1, 1, 0]) == 4
    assert store.peek(A, [3] * 5) == 4


def test_a_prefix_is_not_evicted_to_make_room_for_its_own_continuation() -> None:
    store = new_store(blocks=3)
    commit(store, A, SYSTEM)
    commit(store, A, [*SYSTEM, *range(20)])
    assert matched(store, A, [*SYSTEM, *range(20)]) == 12
    assert store.stats().refused_tokens == 16


def test_what_a_match_holds_cannot_be_evicted() -> None:
    store = new_store(blocks=3)
    commit(store, A, SYSTEM)
    with store.lookup(A, [*SYSTEM, 1]) as match:
        commit(store, B, list(range(12)))
        assert store.evict(A) == 0
        assert match.tokens == 8
        assert store.stats().held_blocks == 2
    assert matched(store, A, [*SYSTEM, 1]) == 8
    assert matched(store, B, list(range(12))) == 4
    match.close()
    assert store.problems() == []


def test_pinned_prefixes_outlive_everything_else_until_they_are_unpinned() -> None:
    store = new_store(blocks=4)
    commit(store, A, SYSTEM)
    assert store.pin(A, SYSTEM) == store.pin(A, SYSTEM) == 8
    for turn in range(10):
        commit(store, A, [turn] * 12)
    assert store.evict(A) == 8
    assert matched(store, A, [*SYSTEM, 1]) == 8
    assert store.stats().pinned_blocks == 2
    assert not store.unpin(B, SYSTEM)
    assert store.unpin(A, SYSTEM)
    assert not store.unpin(A, SYSTEM)
    assert store.evict(A) == 8
    assert store.problems() == []


def test_pins_hold_no_more_than_half_the_store_and_take_in_what_came_later() -> None:
    store = new_store(blocks=6)
    chat = list(range(24))
    commit(store, A, chat[:8])
    assert store.pin(A, chat) == 8
    commit(store, A, chat)
    assert store.pin(A, chat) == 12
    assert store.stats().pinned_blocks == 3
    assert store.pin(A, chat[:4]) == 4, "shares a block that is pinned anyway"


def test_evicting_a_prefix_leaves_what_others_continue() -> None:
    store = new_store()
    commit(store, A, [*SYSTEM, 1, 1, 1, 1, 5, 5, 5, 5])
    commit(store, A, [*SYSTEM, 2, 2, 2, 2])
    assert store.evict(A, [7] * 4) == 0
    assert store.evict(B) == 0
    assert store.evict(A, [*SYSTEM, 1, 1, 1, 1]) == 8
    assert store.peek(A, [*SYSTEM, 2, 2, 2, 2, 0]) == 12
    assert store.evict(A, [*SYSTEM, 2, 2, 2, 2]) == 12
    assert store.problems() == []
    assert store.stats().blocks == 0


def test_kv_of_another_shape_is_refused_and_nothing_is_kept_of_it() -> None:
    store = new_store()
    shape = KVShape(
        layers=2, query_heads=2, kv_heads=1, head_dim=2, context=64, dtype=torch.float16, device=torch.device("cpu")
    )
    kv = RowsKV(shape, 1 << 20)
    slot = kv.open(8)
    kv.load(slot, 0, kv_of(A, SYSTEM).half())
    with pytest.raises(
        ValueError, match=r"float16 \(2, 2, 1, 4, 2\) are needed, and one is of torch\.float32 \(2, 2, 1, 4, 2\)"
    ):
        store.commit(A, SYSTEM, partial(kv.export_into, slot))
    with pytest.raises(ValueError, match=r"taps gave \(1, 2, 3\); this store keeps layers \(1, 2\), so \(2, 2, 3\)"):
        store.commit(A, SYSTEM, Computed(A, SYSTEM).export, lambda start, stop: torch.zeros(1, stop - start, 3))
    assert store.stats().blocks == 0
    assert store.problems() == []


def test_a_block_keeps_no_memory_but_its_own_alive() -> None:
    store = new_store()
    commit(store, A, [*SYSTEM, *range(20)], taps=True)
    with store.lookup(A, [*SYSTEM, *range(20)]) as match:
        for block in match.blocks:
            assert block.taps is not None
            assert block.taps.untyped_storage().nbytes() == LAYOUT.tap_bytes


def test_memory_is_used_again_once_nobody_reads_it() -> None:
    store = new_store(blocks=1)

    def stored(token: int) -> Block:
        commit(store, A, [token] * BLOCK)
        with store.lookup(A, [token] * (BLOCK + 1)) as match:
            return match.blocks[0]

    read = stored(1)
    before, place = read.data.clone(), read.data.data_ptr()
    other = stored(2).data.data_ptr()
    assert stored(3).data.data_ptr() == other != place
    assert torch.equal(read.data, before), "somebody still reads it"
    del read
    store.bytes_limit *= 2  # or what is evicted for it is taken
    assert stored(4).data.data_ptr() == place


def test_a_store_without_room_stores_nothing_and_says_so() -> None:
    store = new_store(blocks=0)
    assert commit(store, A, SYSTEM) == []
    assert store.stats().refused_tokens == 8
    with pytest.raises(ValueError, match="block_tokens at least 1, not 0 and 0"):
        PrefixStore(IDENTITY, bytes_limit=0, block_tokens=0)


def test_the_mean_of_a_prompts_hidden_states_survives_a_hit() -> None:
    store = new_store()
    first, second = [*SYSTEM, 1, 2, 3], [*SYSTEM, 4, 5]
    commit(store, A, first, taps=True)
    with store.lookup(A, second, taps=True) as match:
        cached = match.tap_sum()
        assert cached is not None
        rest = taps_of(A, second)[:, match.tokens :].sum(1)
        assert match.tokens == 8
    torch.testing.assert_close((cached + rest) / len(second), taps_of(A, second).mean(1))


def test_who_needs_hidden_states_matches_only_blocks_that_have_them() -> None:
    store = new_store()
    commit(store, A, [*SYSTEM, 1, 1, 1, 1])
    with store.lookup(A, [*SYSTEM, 1, 1, 1, 1, 0], taps=True) as match:
        assert match.tokens == 0
    with store.lookup(A, [*SYSTEM, 1]) as match:
        assert match.tokens == 8
        assert match.tap_sum() is None
    assert commit(store, A, SYSTEM, taps=True) == [], "the KV is there; the hidden states are added"
    with store.lookup(A, [*SYSTEM, 1, 1, 1, 1, 0], taps=True) as match:
        assert match.tokens == 8
        torch.testing.assert_close(match.tap_sum(), taps_of(A, SYSTEM).sum(1))
    assert store.problems() == []


def test_a_full_store_makes_room_for_hidden_states_that_are_added() -> None:
    store = new_store(10)
    commit(store, A, range(4 * BLOCK))
    for n in range(1, 8):
        commit(store, A, range(1000 * n, 1000 * n + BLOCK))
    commit(store, A, range(4 * BLOCK), taps=True)
    with store.lookup(A, range(4 * BLOCK + 1), taps=True) as match:
        assert match.tokens == 4 * BLOCK
    assert store.problems() == []


def test_hidden_states_that_were_not_kept_are_not_stored() -> None:
    store = new_store()
    computed = Computed(A, SYSTEM)
    assert store.commit(A, SYSTEM, computed.export, lambda start, stop: None) == 8
    with store.lookup(A, [*SYSTEM, 1], taps=True) as match:
        assert match.tokens == 0


def test_events_tell_a_router_what_would_be_matched() -> None:
    """As vLLM's: a block is named by all that comes before it, and told once stored and once removed."""
    events: list[KVEvent] = []
    store = new_store(blocks=5, events=events)
    there: dict[bytes, tuple[bytes | None, tuple[int, ...]]] = {}
    for turn in range(12):
        commit(store, A, [turn % 5] * 4 + [turn] * 8)
        for event in events:
            if isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    del there[name]
                continue
            assert isinstance(event, BlockStored)
            assert event.block_size == BLOCK
            parent = event.parent_block_hash
            assert parent is None or parent in there
            for i, name in enumerate(event.block_hashes):
                assert name not in there
                there[name] = (parent, tuple(event.token_ids[i * BLOCK : (i + 1) * BLOCK]))
                parent = name
        events.clear()
        chains = set()
        for name in there:
            chain: tuple[int, ...] = ()
            step: bytes | None = name
            while step is not None:
                step, tokens = there[step]
                chain = tokens + chain
            chains.add(chain)
        assert len(chains) == store.stats().blocks == len(there)
        assert all(store.peek(A, [*chain, 0]) == len(chain) for chain in chains)


def test_hits_are_counted_in_tokens() -> None:
    store = new_store(blocks=3)
    commit(store, A, SYSTEM)
    matched(store, A, [*SYSTEM, 1, 2])
    matched(store, B, [5] * 7)
    store.peek(A, [*SYSTEM, 1, 2])
    commit(store, B, [5] * 8)
    stats = store.stats()
    assert (stats.asked_tokens, stats.hit_tokens) == (17, 8)
    assert (stats.stored_tokens, stats.evicted_tokens, stats.blocks) == (16, 4, 3)
    assert stats.bytes_used == stats.bytes_limit
