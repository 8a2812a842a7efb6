"""The runner against transformers: the same numbers, however the tokens are cut into steps."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from local_engine import attention
from local_engine.errors import ModelLoadError
from local_engine.kv import KVFull, KVShape
from local_engine.kv_paged import PagedKV
from local_engine.kv_rows import RowsKV
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment, new_kv
from tests.local_engine.devices import CUDA, NEEDS_CUDA
from tests.local_engine.runner_harness import (
    BUDGET,
    FAMILIES,
    LAYERS,
    WIDTH,
    Pair,
    close,
    text,
    tiny_model,
    tiny_network,
    tolerance,
)

Models = Callable[..., LocalModel]


@cache
def reference(family: str, device: str, dtype: torch.dtype) -> Any:
    return tiny_network(family).to(device=device, dtype=dtype)


@pytest.fixture(scope="module")
def models(bundled: LocalModel) -> Models:
    @cache
    def model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LocalModel:
        made = tiny_model(family, bundled)
        return dataclasses.replace(
            made, network=made.network.to(device=device, dtype=dtype), device=torch.device(device)
        )

    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(
    params=[
        pytest.param((RowsKV, True, "cpu", torch.float32), id="rows-fused"),
        pytest.param((RowsKV, False, "cpu", torch.float32), id="rows-modules"),
        pytest.param((PagedKV, True, "cpu", torch.float32), id="pages-fused"),
        pytest.param((PagedKV, True, "cuda", torch.float32), id="cuda-fused", marks=NEEDS_CUDA),
        pytest.param((PagedKV, False, "cuda", torch.float32), id="cuda-modules", marks=NEEDS_CUDA),
        pytest.param((PagedKV, True, "cuda", torch.bfloat16), id="cuda-kernel", marks=NEEDS_CUDA),
    ]
)
def pair(request: pytest.FixtureRequest, family: str, models: Models) -> Pair:
    new, fused, *where = request.param
    model = models(family, *where)
    kv = new(KVShape.of(model), BUDGET)
    return Pair(Runner(model, kv, fused=fused), kv, reference(family, *where))


@pytest.fixture(params=["cpu", CUDA])
def qwen(request: pytest.FixtureRequest, models: Models) -> Pair:
    model = models("qwen3", request.param, torch.float32)
    kv = new_kv(model, BUDGET)
    return Pair(Runner(model, kv), kv, reference("qwen3", request.param, torch.float32))


@pytest.mark.parametrize("chunk", [60, 17, 1])
def test_a_prompt_in_chunks_of_any_size_has_the_logits_of_transformers(pair: Pair, chunk: int) -> None:
    tokens = text(60)  # past Mistral's window of 24
    slot = pair.kv.open(8)
    logits = [
        pair.runner.run([Segment(slot, start, part, logits=len(part))]).logits
        for start in range(0, 60, chunk)
        if (part := tokens[start : start + chunk])
    ]
    assert close(torch.cat(logits), pair.expected(tokens, last=60))


def test_greedy_outputs_are_those_of_generate(pair: Pair) -> None:
    prompts = [text(length, seed=length) for length in (3, 30, 17, 41)]
    slots = [pair.read(prompt[:-1]) for prompt in prompts]
    written = [list(prompt) for prompt in prompts]
    for _ in range(20):
        segments = [
            Segment(slot, len(tokens) - 1, tokens[-1:], logits=1) for slot, tokens in zip(slots, written, strict=True)
        ]
        for tokens, logits in zip(written, pair.runner.run(segments).logits, strict=True):
            tokens.append(int(logits.argmax()))
    for prompt, tokens in zip(prompts, written, strict=True):
        if pair.kv.shape.dtype != torch.float32:  # its best tokens lie too close together for the same choice
            logits = pair.expected(tokens[:-1], last=20)
            chosen = logits.gather(1, pair.ids(tokens[-20:]).T)
            assert float((logits.amax(1, keepdim=True) - chosen).max()) <= 2 * tolerance(logits)
            continue
        ids = pair.ids(prompt)
        whole = pair.reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert tokens == whole[0].tolist()


def test_one_step_mixes_decode_prefill_and_verify(pair: Pair) -> None:
    texts = [text(length, seed=length) for length in (40, 33, 20, 26, 50, 37)]
    news = [1, 4, 20, 1, 30, 4]  # decode, verify, first prompt, decode, later prompt, verify
    slots = [pair.read(tokens[:-new]) if new < 20 else pair.kv.open(1) for tokens, new in zip(texts, news, strict=True)]
    pair.runner.run([Segment(slots[4], 0, texts[4][:20])])
    segments = [
        Segment(slot, len(tokens) - new, tokens[-new:], logits=new)
        for slot, tokens, new in zip(slots, texts, news, strict=True)
    ]
    out = pair.runner.run(segments)
    expected = torch.cat([pair.expected(tokens, last=new) for tokens, new in zip(texts, news, strict=True)])
    assert close(out.logits, expected)
    assert [pair.kv.length(slot) for slot in slots] == [len(tokens) for tokens in texts]


def test_rows_stay_right_as_their_neighbours_come_and_go(pair: Pair) -> None:
    texts = {pair.read(text(length, seed=length)): text(length, seed=length) for length in (30, 12, 45, 28, 39)}
    first, *_, last = texts
    for slot in (first, last):
        pair.kv.close(slot)
        del texts[slot]
    texts[pair.read(text(9))] = text(9)
    segments = []
    for slot, tokens in texts.items():
        tokens.append(7)
        segments.append(Segment(slot, len(tokens) - 1, [7], logits=1))
    expected = torch.cat([pair.expected(tokens) for tokens in texts.values()])
    assert close(pair.runner.run(segments).logits, expected)


def test_truncate_forgets(pair: Pair) -> None:
    tokens = text(30)
    slot = pair.read(tokens)
    pair.kv.truncate(slot, 18)
    assert close(pair.next_logits(slot, [*tokens[:18], 3]), pair.expected([*tokens[:18], 3])[0])


def test_a_fork_goes_its_own_way(pair: Pair) -> None:
    tokens = text(30)
    slot = pair.read(tokens)
    forked = pair.kv.fork(slot, 21)
    assert close(pair.next_logits(forked, [*tokens[:21], 3]), pair.expected([*tokens[:21], 3])[0])
    assert close(pair.next_logits(slot, [*tokens, 4]), pair.expected([*tokens, 4])[0])


def test_exported_tokens_load_into_another_slot(pair: Pair) -> None:
    tokens = text(30)
    slot = pair.read(tokens)
    parts = [pair.kv.export(slot, 0, 16), pair.kv.export(slot, 16, 29)]
    assert parts[1].shape == (LAYERS, 2, 2, 13, pair.kv.shape.head_dim)
    pair.kv.close(slot)
    loaded = pair.kv.open(1)
    pair.kv.load(loaded, 0, parts[0])
    pair.kv.load(loaded, 16, parts[1])
    assert close(pair.next_logits(loaded, tokens), pair.expected(tokens)[0])


def test_taps_are_the_hidden_states_of_transformers_bit_for_bit(family: str, bundled: LocalModel) -> None:
    """On a CPU: on CUDA transformers attends by another kernel than pages do."""
    model = tiny_model(family, bundled)
    kv = new_kv(model, BUDGET)
    pair = Pair(Runner(model, kv, fused=False), kv, tiny_network(family))
    tokens = text(20)
    with torch.no_grad():
        # The last entry of transformers' own list is taken after the final norm, so the last layer is asked itself.
        last: list[Tensor] = []
        hook = pair.reference.model.layers[-1].register_forward_hook(lambda _m, _i, output: last.append(output))
        hidden = pair.reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        hook.remove()
    expected = [*hidden[:-1], last[0]]
    slot = pair.kv.open(20)
    out = pair.runner.run([Segment(slot, 0, tokens, taps=(19, 0, 7))], tap_layers=(3, 0, 1, 2, 0))
    assert sorted(out.hidden) == [0, 1, 2, 3]
    assert 4 not in out.hidden
    for layer, states in out.hidden.items():
        assert torch.equal(states, expected[layer][0, [19, 0, 7]])


def test_taps_come_in_segment_order(qwen: Pair) -> None:
    texts = [text(length, seed=length) for length in (25, 10, 18)]
    slots = [qwen.read(texts[0][:-1]), qwen.kv.open(1), qwen.read(texts[2][:-1])]
    segments = [
        Segment(
            slot, 0 if slot == slots[1] else len(tokens) - 1, tokens if slot == slots[1] else tokens[-1:], taps=(0,)
        )
        for slot, tokens in zip(slots, texts, strict=True)
    ]
    hidden = qwen.runner.run(segments, tap_layers=(LAYERS,)).hidden[LAYERS]
    with torch.no_grad():
        for row, tokens, at in zip(hidden, texts, (24, 0, 17), strict=True):
            states = qwen.reference.model(qwen.ids(tokens)).last_hidden_state[0, at]
            assert close(qwen.reference.model.norm(row), states)


def test_a_step_stops_at_a_layer_and_resumes_there(pair: Pair) -> None:
    texts = [text(length, seed=length) for length in (30, 14, 22)]
    news = [1, 13, 3]
    slots = [pair.read(tokens[:-new]) for tokens, new in zip(texts, news, strict=True)]
    segments = [
        Segment(slot, len(tokens) - new, tokens[-new:], logits=1)
        for slot, tokens, new in zip(slots, texts, news, strict=True)
    ]
    stopped = pair.runner.run(segments, layers=(0, 1))
    assert stopped.state is not None
    assert stopped.state.shape == (17, WIDTH)
    exits = pair.runner.run(segments, layers=(1, 1), state=stopped.state).logits
    assert torch.equal(stopped.logits, exits)  # the logits of an exit at layer 1
    resumed = pair.runner.run(segments, layers=(1, 3), state=stopped.state)
    assert resumed.state is None
    assert close(resumed.logits, torch.cat([pair.expected(tokens) for tokens in texts]))


def test_tokens_drafted_at_a_layer_are_verified_by_the_layers_above(qwen: Pair) -> None:
    tokens = text(24)
    slot = qwen.read(tokens[:20])
    states = []
    for at in range(20, 24):
        state = qwen.runner.run([Segment(slot, at, [tokens[at]])], layers=(0, 1)).state
        assert state is not None
        states.append(state)
    verify = Segment(slot, 20, tokens[20:], logits=4)
    out = qwen.runner.run([verify], layers=(1, 3), state=torch.cat(states))
    assert close(out.logits, qwen.expected(tokens, last=4))


def test_a_plain_forward_of_a_driven_network_raises(models: Models) -> None:
    model = models("qwen3")
    Runner(model, new_kv(model, BUDGET))
    with pytest.raises(RuntimeError, match="no step is running"):
        model.network(torch.tensor([[1, 2, 3]]))


def test_what_cannot_run_is_refused_and_changes_nothing(qwen: Pair) -> None:
    slot = qwen.read(text(10))
    cases: list[tuple[list[Segment], dict[str, Any], str]] = [
        ([], {}, "at least one segment"),
        ([Segment(slot, 9, [1])], {}, "holds 10 tokens"),
        ([Segment(slot, 11, [1])], {}, "holds 10 tokens"),
        ([Segment(slot, 10, [])], {}, "at least one token"),
        ([Segment(slot, 10, [1]), Segment(slot, 10, [2])], {}, "one segment in a step"),
        ([Segment(slot, 10, [1], logits=2)], {}, "2 logits are wanted of 1"),
        ([Segment(slot, 10, [1])], {"tap_layers": (4,)}, "layer 4 is tapped"),
        ([Segment(slot, 10, [1])], {"layers": (0, 4)}, "between 0 and 3"),
        ([Segment(slot, 10, [1])], {"layers": (1, 3)}, "needed to resume"),
        ([Segment(slot, 10, [1])], {"layers": (1, 3), "state": torch.zeros(1, WIDTH)}, "among them"),
        ([Segment(slot, 9, [1])], {"layers": (1, 3), "state": torch.zeros(2, WIDTH)}, "2 rows"),
        ([Segment(slot, 10, text(247))], {}, "context is 256"),
    ]
    for segments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            qwen.runner.run(segments, **options)
    assert qwen.kv.length(slot) == 10
    assert close(qwen.next_logits(slot, [*text(10), 5]), qwen.expected([*text(10), 5])[0])


def test_a_token_that_the_model_does_not_have_is_refused_before_it_is_looked_up(pair: Pair) -> None:
    slot = pair.read(text(10))
    with pytest.raises(IndexError, match="token 512: the model has tokens 0 to 511"):
        pair.runner.run([Segment(slot, 10, [5, 512], logits=1)])
    assert pair.kv.length(slot) == 10
    assert close(pair.next_logits(slot, [*text(10), 5]), pair.expected([*text(10), 5])[0])


def test_a_step_without_room_runs_nothing(models: Models) -> None:
    shape = dataclasses.replace(KVShape.of(models("qwen3")), context=512)
    kv = RowsKV(shape, 256 * shape.token_bytes)
    runner = Runner(models("qwen3"), kv)
    slot = kv.open(256)
    runner.run([Segment(slot, 0, text(250))])
    with pytest.raises(KVFull, match="256 tokens more"):
        runner.run([Segment(slot, 250, text(7))])
    assert kv.length(slot) == 250
    runner.run([Segment(slot, 250, text(6))])


def test_angles_that_depend_on_the_final_length_are_refused(models: Models) -> None:
    model = models("llama")
    rotary = model.network.model.rotary_emb
    rotary.rope_type = "dynamic"
    try:
        with pytest.raises(ModelLoadError, match="rope_type 'dynamic'"):
            Runner(model, RowsKV(KVShape.of(model), BUDGET))
    finally:
        rotary.rope_type = "default"


def test_the_attention_function_is_known_to_transformers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.attend
