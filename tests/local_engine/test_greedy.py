"""Several tokens in one step: the same as one by one, no more than their owner wants, and for nobody else's waiting."""

import itertools
import math
import operator
from typing import Any

import pytest
import torch

from local_engine import kernels
from local_engine.kv import KVShape
from local_engine.lane import Lane
from local_engine.model import LocalModel, load_model
from local_engine.primitives import Primitives
from local_engine.runner import Runner, Segment, new_kv
from local_engine.sampler import Choice, Sampler
from local_engine.sequence import Sequence
from local_engine.turns import Turn
from local_engine.types import SamplingParams
from tests.local_engine.runner_harness import by_torch

CPU = torch.device("cpu")
PROMPT = list(range(40, 80))
ours = pytest.mark.skipif(not kernels.made_for(torch.float32), reason="this CPU is not one for our kernels")
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(not kernels.made_for(dtype), reason=f"this CPU is not one for our {dtype} kernels"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def new_model(dtype: torch.dtype = torch.float32) -> LocalModel:
    name: Any = str(dtype).removeprefix("torch.")
    return load_model("m", "bundled/nano", dtype=name, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_single_steps(dtype: torch.dtype) -> None:
    model = new_model(dtype)
    kv = new_kv(model, 1 << 24)
    runner = Runner(model, kv)
    one, many = kv.open(64), kv.open(300)
    for slot in (one, many):
        runner.run([Segment(slot, 0, PROMPT)])
    greedy = runner.greedy(many, 100)
    assert greedy is not None
    token, tolerance = 5, 1e-4 if dtype == torch.float32 else 2e-2
    for at in range(60):
        logits = runner.run([Segment(one, len(PROMPT) + at, [token], 1)]).logits[0]
        logprobs = logits.log_softmax(-1)
        found = greedy.after(token)
        assert found.token == int(logits.argmax())
        assert found.logprob == pytest.approx(float(logprobs.max()), abs=tolerance)
        assert found.entropy == pytest.approx(float(torch.special.entr(logprobs.exp()).sum()), abs=tolerance)
        token = found.token
    greedy.commit()
    assert kv.length(many) == kv.length(one) == len(PROMPT) + 60
    assert torch.equal(kv.export(many, 0, 100), kv.export(one, 0, 100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_in_one_call_are_those_of_one_each(dtype: torch.dtype) -> None:
    model = new_model(dtype)
    kv = new_kv(model, 1 << 24)
    runner = Runner(model, kv)
    one, many, few = (kv.open(300) for _ in range(3))
    for slot in (one, many, few):
        runner.run([Segment(slot, 0, PROMPT)])
    single = runner.greedy(one, 100)
    assert single is not None
    given, expected = [5, 6, 7], []
    for token in given:
        choice = single.after(token)
    for _ in range(12):
        expected.append(choice)
        choice = single.after(choice.token)
    ahead = runner.greedy(many, 100)
    assert ahead is not None
    tokens, shares = ahead.ahead(given, 12, 0.0)
    ahead.commit()
    assert tokens == [choice.token for choice in expected]
    assert [math.log(share) for share in shares] == pytest.approx([choice.logprob for choice in expected], abs=1e-5)
    assert kv.length(many) == len(PROMPT) + len(given) + 11, "the last one is not read"
    single.commit()
    assert torch.equal(kv.export(many, 0, kv.length(many)), kv.export(one, 0, kv.length(many)))

    over = list(itertools.accumulate(shares, operator.mul))
    cut = min(range(1, 11), key=shares.__getitem__)
    short = runner.greedy(few, 100)
    assert short is not None
    assert short.ahead(given, 12, (over[cut] + over[cut - 1]) / 2)[0] == tokens[: cut + 1]


@ours
def test_rows_that_are_held_for_torch_are_not_written_by_our_kernels() -> None:
    model = new_model()
    with by_torch():
        kv = new_kv(model, 1 << 24)
    runner = Runner(model, kv)
    slot = kv.open(64)
    runner.run([Segment(slot, 0, PROMPT)])
    assert not runner.writes_alone
    assert runner.greedy(slot, 60) is None


@ours
def test_logits_that_are_no_numbers_name_no_token() -> None:
    model = new_model()
    kv = new_kv(model, 1 << 24)
    runner = Runner(model, kv)
    model.network.model.norm.weight.data.fill_(torch.nan)
    slot = kv.open(64)
    runner.run([Segment(slot, 0, PROMPT)])
    greedy = runner.greedy(slot, 60)
    assert greedy is not None
    with pytest.raises(ArithmeticError, match="no numbers"):
        greedy.after(5)
    assert greedy.ahead([5, 6], 4, 0.0) == ([], [])
    with pytest.raises(IndexError, match="the model has tokens 0 to"):
        greedy.after(model.network.config.vocab_size)


@ours
def test_a_step_brings_what_its_owner_wants() -> None:
    lane, engine = new_lane()
    plain = engine.open("m", PROMPT, greedy(), limit=100)
    while not plain.at_rest:
        lane.step()
    expected = list(plain.ids)
    engine.close(plain)
    asked: list[Choice] = []

    def twelve(choice: Choice) -> bool:
        asked.append(choice)
        return len(asked) % 12 > 0

    sequence = engine.open("m", PROMPT, greedy(), limit=100, writes_on=twelve)
    turns = until_rest(lane, sequence)
    assert list(sequence.ids) == expected
    assert [len(turn.choices) for turn in turns] == [1, 12, 12, 12, 12, 11], "a prompt is read by a step of its own"
    assert asked == [choice for turn in turns[1:] for choice in turn.choices]
    assert sequence.rows == sequence.computed == 99


def test_who_is_not_alone_writes_a_token_a_step() -> None:
    lane, engine = new_lane()
    sequence = engine.open("m", PROMPT, greedy(), limit=60, writes_on=lambda choice: True)
    engine.open("m", PROMPT[::-1], greedy(), limit=60)
    turns = until_rest(lane, sequence)
    assert all(len(turn.choices) == 1 for turn in turns)


@ours
def test_an_owner_that_fails_ends_its_own_sequence_only() -> None:
    def fails(choice: Choice) -> bool:
        raise RuntimeError("made to fail")

    lane, engine = new_lane()
    sequence = engine.open("m", PROMPT, greedy(), writes_on=fails)
    lane.step()
    (turn,) = lane.step()
    assert "made to fail" in str(turn.error)
    engine.close(sequence)
    assert lane.kv.bytes_used == 0


def test_no_room_is_no_failure() -> None:
    """Where a longer stretch does not fit, tokens come one by one as long as they do."""
    model = new_model()
    kv = new_kv(model, 512 * KVShape.of(model).token_bytes)
    kv.open(256)  # somebody else's
    lane = Lane(model, kv, Runner(model, kv))
    engine = Primitives({"m": lane}, None, serials=itertools.count(), arrived=0.0)
    sequence = engine.open("m", PROMPT * 5, greedy(), limit=400, writes_on=lambda choice: True)
    turns = until_rest(lane, sequence)
    assert [len(turn.choices) for turn in turns] == [1] * (256 - len(PROMPT) * 5 + 1) + [0]
    assert turns[-1].out_of_room


def new_lane() -> tuple[Lane, Primitives]:
    """One for which no time passes: a stretch of tokens that takes long ends early."""
    model = new_model()
    kv = new_kv(model, 1 << 24)
    lane = Lane(model, kv, Runner(model, kv), clock=lambda: 0.0)
    return lane, Primitives({"m": lane}, None, serials=itertools.count(), arrived=0.0)


def greedy() -> Sampler:
    return Sampler(SamplingParams(temperature=0), CPU)


def until_rest(lane: Lane, sequence: Sequence) -> list[Turn]:
    turns = []
    while not sequence.at_rest:
        turns += [turn for turn in lane.step() if turn.sequence is sequence]
    return turns
