"""A prefix store of which nothing is used rests, and wakes for whoever it would have had something for."""

from itertools import count
from pathlib import Path

import pytest

from local_engine.engine import Engine
from local_engine.kv import KVShape
from local_engine.model import LocalModel
from local_engine.prefix import PrefixStore
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_tiers import SlowTiers
from local_engine.types import SamplingParams
from tests.local_engine.engine_harness import Caller, StartEngine, Watch
from tests.local_engine.prefix_harness import BLOCK, Computed, matched, new_store

SALT = b"tenant"
ROOM = 10
"""Blocks that a store has."""
PAID = 50
"""Blocks that may go unused for each that is hit for the first time."""
AGAIN = range(1000, 1013)  # three blocks and one token


def offer(store: PrefixStore, tokens: range) -> int:
    """A prompt comes, is looked up, computed and given to the store; how many of its tokens were matched."""
    found = matched(store, SALT, tokens)
    store.commit(SALT, tokens, Computed(SALT, tokens).export, needed=False)
    return found


def unused(blocks: int) -> list[range]:
    """Prompts of two blocks and a token each that share nothing, with so many blocks in all."""
    return [range(100_000 + 100 * at, 100_000 + 100 * at + 2 * BLOCK + 1) for at in range(blocks // 2)]


def resting(slow: SlowTiers | None = None) -> PrefixStore:
    store = new_store(ROOM, slow=slow)
    for prompt in unused(2 * ROOM):
        assert not store.stats().resting
        assert offer(store, prompt) == 0
    offer(store, range(500_000, 500_000 + 2 * BLOCK))
    return store


def test_a_store_that_was_evicted_once_unused_takes_in_only_what_is_needed() -> None:
    store = resting()
    assert store.stats().resting
    kept = store.stats().stored_tokens
    computed = Computed(SALT, AGAIN)
    assert store.commit(SALT, AGAIN, computed.export, needed=False) == 0
    assert computed.exported == []
    assert store.stats().stored_tokens == kept
    assert store.commit(SALT, AGAIN, computed.export) == 3 * BLOCK
    assert store.problems() == []


def test_what_was_needed_does_not_wake_it_when_it_is_read_again() -> None:
    store = resting()
    store.commit(SALT, AGAIN, Computed(SALT, AGAIN).export, needed=True)
    assert matched(store, SALT, AGAIN) == 3 * BLOCK
    assert store.stats().resting


def test_what_was_needed_hides_no_first_hit_of_what_it_continues() -> None:
    store = resting()
    longer = range(500_000, 500_000 + 3 * BLOCK + 1)
    store.commit(SALT, longer, Computed(SALT, longer).export, needed=True)
    assert matched(store, SALT, longer) == 3 * BLOCK
    assert not store.stats().resting


def test_a_prompt_that_it_would_have_had_wakes_it() -> None:
    store = resting()
    assert [offer(store, AGAIN) for _ in range(3)] == [0, 0, 3 * BLOCK]
    assert not store.stats().resting


def test_a_chat_that_goes_on_wakes_it() -> None:
    store = resting()
    turns = [AGAIN[:6], AGAIN[:10], AGAIN]
    assert [offer(store, turn) for turn in turns] == [0, 0, 2 * BLOCK]


def test_the_first_hit_of_a_block_wakes_it_and_a_later_one_does_not() -> None:
    store = resting()
    last = range(500_000, 500_000 + 2 * BLOCK + 1)
    assert matched(store, SALT, last) == 2 * BLOCK
    assert not store.stats().resting
    for prompt in unused(2 * PAID + 2 * ROOM):
        matched(store, SALT, last)
        offer(store, prompt)
    assert store.stats().resting, "a system prompt that all have says nothing of what comes after it"
    assert matched(store, SALT, last) == 2 * BLOCK


def test_a_first_hit_pays_for_what_goes_unused_after_it() -> None:
    store = new_store(ROOM)
    for length in (BLOCK, BLOCK + 1):
        offer(store, range(length))  # one block is hit
    left = store.stats().blocks
    for prompt in unused(2 * (PAID + 2 * ROOM)):
        offer(store, prompt)
        gone = store.stats().evicted_tokens // BLOCK - left
        assert store.stats().resting == (gone > PAID + ROOM), gone
    assert store.stats().resting


@pytest.mark.parametrize(("document", "between"), [(90, 50), (90, 104), (90, 300), (50, 150), (30, 110), (5, 300)])
@pytest.mark.parametrize("idle", [0, 300])
def test_documents_that_are_asked_twice_hit_beside_prompts_that_come_once(
    document: int, between: int, idle: int
) -> None:
    def hits(store: PrefixStore) -> int:
        once = iter(unused(10 * between + idle))
        for _ in range(idle // 2):
            offer(store, next(once))
        assert store.stats().resting == (idle > 0)
        for number in range(10):
            tokens = range(1_000_000 * (number + 1), 1_000_000 * (number + 1) + document * BLOCK + 1)
            offer(store, tokens)
            offer(store, tokens)
            for _ in range(between // 2):
                offer(store, next(once))
        return store.stats().hit_tokens

    assert hits(new_store(100)) >= 0.8 * 10 * document * BLOCK, "one that never rests hits all of each second time"


def test_a_prompt_comes_too_late_to_wake_it_when_it_would_have_been_evicted() -> None:
    store = resting()
    offer(store, AGAIN)
    for prompt in unused(4 * ROOM)[2 * ROOM // 2 :]:
        offer(store, prompt)
    offer(store, AGAIN)
    assert store.stats().resting
    offer(store, AGAIN)
    assert not store.stats().resting


def test_a_store_with_a_disk_never_rests(tmp_path: Path) -> None:
    tiers = SlowTiers([DiskTier(tmp_path, 1 << 26)], wait_s=10.0)
    assert not resting(slow=tiers).stats().resting
    tiers.close(10.0)


def test_what_is_evicted_at_a_callers_word_says_nothing() -> None:
    store = new_store(ROOM)
    for prompt in unused(4 * ROOM):
        offer(store, prompt)
        store.evict(SALT)
    assert not store.stats().resting


# ---- in the engine --------------------------------------------------------------------------------------------------


def tire(engine: Engine) -> Caller:
    """Let its store rest; who asked for that."""
    caller = Caller(engine)
    numbers = count(1_000_003, 1_000_003)
    while not engine.prefix_stats()["m"].resting:
        caller.finished(caller.generate(f"{next(numbers)} is a number.", SamplingParams(max_tokens=1)))
    return caller


def test_prompts_that_come_together_are_read_once_while_it_rests(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    watch = Watch()
    engine = start_engine(bundled, make_runner=watch, prefix_bytes=1 << 20, prefill_chunk=32)
    caller = tire(engine)
    before = engine.prefix_stats()["m"].stored_tokens
    caller.finished(caller.generate("Is nobody here?"))
    assert engine.prefix_stats()["m"].stored_tokens == before
    watch.gated = True
    shared = "Anna has 12 apples. " * 12
    passes = len(watch.passes)
    first = caller.generate(shared + "What is 1 + 4?")
    watch.wait_for_pass(passes + 1)  # held while the others come
    others = [caller.generate(shared + f"What is {n} + 4?") for n in (2, 3)]
    watch.allow(10_000)
    template = caller.finished(first).cached_tokens
    assert all(caller.finished(id).cached_tokens > template + 100 for id in others)


def test_what_rests_and_is_not_read_again_is_not_stored_while_the_store_rests(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    engine = start_engine(bundled, prefix_bytes=1 << 20)
    caller = tire(engine)
    before = engine.prefix_stats()["m"].stored_tokens
    for number in range(3):
        caller.wait(caller.score(f"{number} is what at noon, when the sky is clear?", ["blue", "red"]))
        caller.finished(caller.generate(f"{number} is half of what?", SamplingParams(max_tokens=1), n=2))
    stats = engine.prefix_stats()["m"]
    assert (stats.stored_tokens, stats.resting) == (before, True)


def test_forks_that_get_no_room_find_their_prompt_in_a_store_that_rests(
    endless: LocalModel, start_engine: StartEngine
) -> None:
    engine = start_engine(endless, prefix_bytes=1 << 20, kv_bytes=600 * KVShape.of(endless).token_bytes)
    caller = tire(engine)
    before = engine.stats().computed_tokens
    id = caller.generate("What is 2 + 3? " * 30, SamplingParams(max_tokens=2, temperature=0), n=3)
    prompt = caller.finished(id).input_tokens
    assert [caller.finished(id, choice).output_tokens for choice in range(3)] == [2] * 3
    assert engine.stats().computed_tokens - before < 1.5 * prompt
