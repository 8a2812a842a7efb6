"""A probe of a model's own reading: heard at the last token of the prompt, which nobody reads twice."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from local_engine.chat import parse_messages, prompt_tokens
from local_engine.engine import Engine
from local_engine.errors import ConfigError
from local_engine.model import LocalModel, load_model
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_tiers import SlowTiers
from local_engine.runner import Runner, new_kv
from local_engine.sounding import rated_layers
from local_engine.types import ProbeResult, SamplingParams, TapSpec
from tests.local_engine.engine_harness import Caller, StartEngine, Watch, user
from tests.local_engine.fake_prober import FakeReader

QUESTION = "Anna has 12 apples. She buys 7 more. How many apples are there now?"
OTHER = "Ben has 3 pears and eats 2 of them. How many pears are left?"
ANSWER = SamplingParams(temperature=0, max_tokens=12)


def probe(caller: Caller, text: str = QUESTION, **options: Any) -> ProbeResult:
    result = caller.wait(caller.probe(user(text), "m", **options))[-1]
    assert isinstance(result, ProbeResult), result
    return result


def test_no_token_of_a_probed_prompt_is_computed_twice(bundled: LocalModel, start_engine: StartEngine) -> None:
    """The same tokens are computed, and the same answer is given, with a probe before it as without."""
    plain = start_engine(bundled)
    caller = Caller(plain)
    id = caller.generate(QUESTION, ANSWER)
    expected, prompt = caller.content(id), caller.finished(id).input_tokens

    engine = start_engine(bundled, readers={"m": [FakeReader()]})
    caller = Caller(engine)
    probed = probe(caller, ttl_s=60)
    assert probed.input_tokens == {"m": prompt}
    assert engine.stats().computed_tokens == prompt
    assert engine.stats().held_prompts == 1
    id = caller.generate(QUESTION, ANSWER)
    assert caller.content(id) == expected
    assert caller.finished(id).cached_tokens == prompt
    assert engine.stats().computed_tokens == plain.stats().computed_tokens
    assert (engine.stats().held_prompts, engine.stats().held_found) == (0, 1)


def test_it_hears_what_taps_tell(bundled: LocalModel, start_engine: StartEngine) -> None:
    reader = FakeReader((0, 3, 6))
    caller = Caller(start_engine(bundled, readers={"m": [reader]}, prefill_chunk=7))
    probe(caller)
    (states, rating) = reader.seen[0]
    id = caller.generate(QUESTION, ANSWER, taps=TapSpec((0, 3, 6)))
    tapped = next(one for delta in caller.deltas(id) for one in delta.tapped)
    told = np.frombuffer(tapped.data, "<f2").reshape(tapped.shape)[0]
    np.testing.assert_allclose(states, told, atol=2e-2, rtol=1e-2)
    assert 0 <= rating.entropy < math.log(512)
    assert (rating.p_true, rating.internal_confidence) == (None, None)


def test_where_a_prefix_is_stored_only_the_rest_is_read_and_the_same_is_heard(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    """What a probe reads, the last token's states, is computed in any case: a hit takes nothing from it."""
    cold, warm = FakeReader((0, 3, 6)), FakeReader((0, 3, 6))
    probed = probe(Caller(start_engine(bundled, readers={"m": [cold]}, prefix_bytes=0)))
    engine = start_engine(bundled, readers={"m": [warm]})
    caller = Caller(engine)
    caller.finished(caller.generate(f"{QUESTION} Add one.", ANSWER))
    before, stored = engine.stats().computed_tokens, engine.prefix_stats()["m"].hit_tokens
    assert probe(caller).input_tokens == probed.input_tokens
    hit = engine.prefix_stats()["m"].hit_tokens - stored
    assert hit >= 16
    assert engine.stats().computed_tokens - before == probed.input_tokens["m"] - hit
    np.testing.assert_allclose(warm.seen[0][0], cold.seen[0][0], atol=1e-4, rtol=1e-4)


def mean_states(model: LocalModel, text: str, layers: tuple[int, ...]) -> Any:
    """By transformers' own forward; no layer is the last, whose states it gives after the final norm."""
    ids = prompt_tokens(model.tokenizer, parse_messages(user(text)))
    with torch.no_grad():
        states = (
            load_model("m", "bundled/base", "float32", "cpu")
            .network(torch.tensor([ids]), output_hidden_states=True)
            .hidden_states
        )
    return np.stack([states[layer][0].mean(0).numpy() for layer in layers])


@contextlib.contextmanager
def hearing(
    model: LocalModel, folder: Path, layers: tuple[int, ...], chunk: int
) -> Iterator[tuple[Engine, FakeReader]]:
    """An engine with a probe that hears whole prompts, second in line, and a disk."""
    Runner(model, new_kv(model, 1 << 24))  # the first one takes weights over: both engines are to find them so
    reader = FakeReader(layers, over="prompt")
    readers = {"m": [FakeReader((6,), decided=False, version="first@1"), reader]}
    tiers = SlowTiers([DiskTier(folder, 1 << 26)], wait_s=60)
    engine = Engine({"m": model}, readers=readers, prefill_chunk=chunk, prefix_tiers=tiers)
    engine.start()
    try:
        yield engine, reader
        assert tiers.flush(60)
    finally:
        engine.stop()


@pytest.mark.parametrize("chunk", [7, 256])
def test_a_probe_that_hears_the_whole_prompt_computes_no_stored_token_for_it(
    bundled: LocalModel, tmp_path: Path, chunk: int
) -> None:
    layers, more = (0, 3, 5), f"{QUESTION} Add one."

    def computed(engine: Engine, text: str = QUESTION) -> tuple[int, int]:
        """(tokens of the prompt, those of them that were computed)"""
        before = engine.stats().computed_tokens
        tokens = probe(Caller(engine), text).input_tokens["m"]
        return tokens, engine.stats().computed_tokens - before

    with hearing(bundled, tmp_path, layers, chunk) as (engine, reader):
        caller = Caller(engine)
        caller.finished(caller.generate(QUESTION, ANSWER))  # stored, and without its states
        tokens, cold = computed(engine)
        assert cold == tokens, "where its states are not there, it is read"
        rest = tokens - (tokens - 1) // 16 * 16
        assert computed(engine) == (tokens, rest), "where they are, they are not"
        assert computed(engine, more)[1] < tokens
        for (states, _), text in zip(reader.seen, (QUESTION, QUESTION, more), strict=True):
            np.testing.assert_allclose(states, mean_states(bundled, text, layers), atol=1e-4, rtol=1e-4)
        store = engine._lanes["m"].store
        assert store is not None
        assert store.problems() == [], "their bytes are counted"
    with hearing(bundled, tmp_path, layers, chunk) as (engine, reader):
        assert computed(engine) == (tokens, rest), "the disk has them, too"
        np.testing.assert_allclose(reader.seen[0][0], mean_states(bundled, QUESTION, layers), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"text": OTHER},
        {"salt": "another tenant"},
        {"taps": TapSpec((1,))},
        {"n": 3},
        {"sampling": SamplingParams(temperature=0, max_tokens=12, effort="high")},
        {"prefix": "The"},
    ],
    ids=["other text", "other tenant", "taps", "choices", "effort", "prefix"],
)
def test_whatever_follows_is_answered_as_if_nothing_had_been_kept(
    bundled: LocalModel, start_engine: StartEngine, change: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"text": QUESTION, "sampling": ANSWER} | change
    caller = Caller(start_engine(bundled))
    id = caller.generate(**asked)
    expected = [caller.content(id, choice) for choice in range(change.get("n", 1))]

    engine = start_engine(bundled, readers={"m": [FakeReader()]})
    caller = Caller(engine)
    probe(caller, ttl_s=60)
    id = caller.generate(**asked)
    assert [caller.content(id, choice) for choice in range(change.get("n", 1))] == expected
    foreign = "text" in change or "salt" in change
    assert engine.stats().held_prompts == foreign
    if "salt" in change:
        assert caller.finished(id).cached_tokens == 0


def test_a_kept_prompt_ends_by_itself(bundled: LocalModel, start_engine: StartEngine) -> None:
    engine = start_engine(bundled, readers={"m": [FakeReader()]})
    caller = Caller(engine)
    probe(caller, ttl_s=0.01)
    while (stats := engine.stats()).held_prompts or stats.kv_bytes:  # it leaves the list before its room is free
        torch.randn(100).sum()  # the engine's own clock wakes it
    probe(caller, ttl_s=0)
    assert engine.stats().held_prompts == 0


def test_kept_prompts_give_way_where_room_is_short(bundled: LocalModel, start_engine: StartEngine) -> None:
    engine = start_engine(bundled, readers={"m": [FakeReader()]}, kv_bytes=2_400_000, prefix_bytes=0)
    caller = Caller(engine)
    held = []
    for at in range(12):
        probe(caller, f"{QUESTION} And {at}?", ttl_s=60)
        held.append(engine.stats().held_prompts)
    assert held[0] == 1
    assert held[-1] < 12
    long = caller.generate(f"{QUESTION} " * 8, ANSWER)
    assert caller.finished(long).output_tokens == ANSWER.max_tokens
    assert engine.stats().preemptions == 0


def test_a_model_rates_itself_on_the_same_reading(bundled: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    reader = FakeReader((), " Is this right: yes or no? It is ")
    engine = start_engine(bundled, readers={"m": [reader]}, make_runner=watch)
    caller = Caller(engine)
    probed = probe(caller, ttl_s=60)
    ((states, rating),) = reader.seen
    assert len(states) == 0
    assert rating.p_true is not None
    assert rating.internal_confidence is not None
    assert 0 < rating.p_true < 1
    assert 0 < rating.internal_confidence < 1
    question = engine.stats().computed_tokens - probed.input_tokens["m"]
    assert question == len(bundled.tokenizer.encode(reader.question, add_special_tokens=False))
    id = caller.generate(QUESTION, ANSWER)
    assert caller.finished(id).cached_tokens == probed.input_tokens["m"]


@pytest.mark.parametrize("decided", [True, False])
def test_the_dearer_reader_is_asked_only_where_the_first_left_something_open(
    bundled: LocalModel, start_engine: StartEngine, decided: bool
) -> None:
    first = FakeReader((1,), decided=decided, version="first@1")
    second = FakeReader((), "yes or no?", version="second@1")
    caller = Caller(start_engine(bundled, readers={"m": [first, second]}))
    probed = probe(caller)
    assert (len(first.seen), len(second.seen)) == (1, 0 if decided else 1)
    assert probed.undecided == []
    assert probed.p_success == {"m": 0.25}


def test_rated_layers_end_with_the_last() -> None:
    assert rated_layers(6) == (4, 6)
    assert rated_layers(1) == (1,)
    assert rated_layers(28) == (14, 16, 18, 20, 22, 24, 26, 28)


def test_a_probe_that_nobody_reads_is_refused(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    assert "no probe reads the prompts of 'm'" in caller.failed(caller.probe(user("hi"), "m")).message
    assert caller.failed(caller.probe(user("hi"), "x")).code == "model_not_found"


def test_a_conversation_that_only_other_models_can_go_on_with_is_probed(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled, readers={"m": [FakeReader()]}))
    call = {"id": "1", "type": "custom", "custom": {"name": "f", "input": "x"}}
    messages = json.dumps(
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ).encode()
    assert isinstance(caller.wait(caller.probe(messages, "m"))[-1], ProbeResult)
    assert "messages[1].tool_calls[0]" in caller.failed(caller.generate(messages)).message


def test_readers_that_do_not_fit_their_model_are_refused(bundled: LocalModel) -> None:
    with pytest.raises(ConfigError, match="wants layers"):
        Engine({"m": bundled}, readers={"m": [FakeReader((99,))]})
    with pytest.raises(ConfigError, match="there are m here"):
        Engine({"m": bundled}, readers={"x": [FakeReader()]})


def test_a_probe_whose_caller_leaves_keeps_nothing(bundled: LocalModel, start_engine: StartEngine) -> None:
    gate = Watch(gated=True)
    engine = start_engine(bundled, readers={"m": [FakeReader()]}, make_runner=gate, prefill_chunk=4)
    caller = Caller(engine)
    id = caller.probe(user(QUESTION), "m", ttl_s=60)
    gate.wait_for_pass(1)
    caller.cancel(id)
    gate.allow(100)
    assert caller.finished(id).finish_reason == "cancelled"
    assert (engine.stats().held_prompts, engine.stats().kv_bytes) == (0, 0)
