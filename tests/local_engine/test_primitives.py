"""Sequences that are forked, cut, fed, scored, preempted and closed at random, against recomputing from scratch."""

import itertools
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from local_engine.kv import KVShape
from local_engine.lane import Lane
from local_engine.model import LocalModel
from local_engine.prefix import PrefixStore
from local_engine.prefix_identity import KVIdentity, KVLayout
from local_engine.primitives import Primitives
from local_engine.runner import Runner, Segment, new_kv
from local_engine.sampler import Sampler
from local_engine.sequence import Sequence
from local_engine.turns import Turn
from local_engine.types import SamplingParams, TapSpec
from tests.conftest import Size
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.runner_harness import CONTEXT, text, tiny_model, tiny_network

CPU = torch.device("cpu")
PROMPTS = [text(n, seed) for seed, n in enumerate((3, 17, 40, 41, 70))]
CLOSE = 1e-4
LIMIT = 120


@pytest.fixture(scope="module")
def model(bundled: LocalModel) -> LocalModel:
    return tiny_model("qwen3", bundled)


@pytest.fixture(scope="module")
def reference(device: torch.device) -> Any:
    return tiny_network("qwen3").to(device)


def greedy() -> Sampler:
    return Sampler(SamplingParams(temperature=0), CPU)


@dataclass
class World:
    """A lane with room for three sequences, and what its sequences ought to be."""

    lane: Lane
    engine: Primitives
    reference: Any
    texts: dict[Sequence, list[int]] = field(default_factory=dict)
    written: dict[Sequence, set[int]] = field(default_factory=dict)
    """Positions of tokens that the model chose."""
    asked: dict[Sequence, tuple[list[int], list[int]]] = field(default_factory=dict)
    """Of the scores under way: what was there, and what is scored."""
    offered: dict[Sequence, tuple[list[int], float]] = field(default_factory=dict)

    def step(self) -> None:
        for turn in self.lane.step():
            self._hear(turn)

    def _hear(self, turn: Turn) -> None:
        assert turn.error is None
        assert not turn.out_of_room
        sequence = turn.sequence
        offered, floor = self.offered.pop(sequence, ([], 0.0)) if turn.choices else ([], 0.0)
        kept = len(turn.choices) - 1 if offered else 0
        assert [choice.token for choice in turn.choices[:kept]] == offered[:kept]
        for at, choice in enumerate(turn.choices):
            if at >= kept:
                self.written[sequence].add(len(self.texts[sequence]))
            else:
                assert choice.logprob >= floor
                logprobs = torch.log_softmax(self.logits(self.texts[sequence])[-1], -1)
                assert abs(float(logprobs[choice.token]) - choice.logprob) < CLOSE
            self.texts[sequence].append(choice.token)
        if turn.scores is not None:
            before, tokens = self.asked.pop(sequence)
            logprobs = torch.log_softmax(self.logits(before + tokens)[len(before) - 1 : -1], -1)
            expected = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
            assert torch.allclose(torch.tensor(turn.scores.logprobs), expected, atol=CLOSE)
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            assert torch.allclose(torch.tensor(turn.scores.entropies), entropies, atol=CLOSE)
            self.engine.close(sequence)

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        found: Tensor = self.reference(torch.tensor([tokens], device=self.reference.device)).logits[0]
        return found.cpu()

    def wander(self, rng: random.Random) -> None:
        """One random operation."""
        sequences = list(self.texts)
        if not sequences or rng.random() < 0.1:
            return self._open(rng)
        sequence = rng.choice(sequences)
        tokens = self.texts[sequence]
        match rng.choice(
            ("fork", "append", "truncate", "score", "write", "hold", "offer", "rest", "close", "preempt", *["step"] * 8)
        ):
            case "fork" if len(sequences) < 6:
                length = rng.randint(1, min(len(tokens), LIMIT - 1))
                child = self.engine.fork(sequence, greedy() if rng.random() < 0.5 else None, length=length)
                self.texts[child] = tokens[:length]
                self.written[child] = {at for at in self.written[sequence] if at < length}
            case "append":
                more = text(rng.randint(0, max(0, min(20, LIMIT - len(tokens)))), rng.randint(0, 99))
                self.engine.append(sequence, more)
                tokens += more
            case "truncate":
                length = rng.randint(1, len(tokens))
                self.engine.truncate(sequence, length)
                del tokens[length:]
                self.written[sequence] = {at for at in self.written[sequence] if at < length}
            case "score" if len(tokens) < LIMIT:
                candidate = text(rng.randint(1, min(12, LIMIT - len(tokens))), rng.randint(0, 99))
                self.asked[self.engine.score(sequence, candidate)] = (list(tokens), candidate)
            case "write":
                self.engine.write(sequence, greedy())
            case "offer" if sequence.sampler is not None and len(tokens) < LIMIT - 1:
                offered = text(rng.randint(1, min(12, LIMIT - 1 - len(tokens))), rng.randint(0, 99))
                floor = rng.choice((-100.0, -7.0, 0.0))
                self.engine.offer(sequence, offered, floor)
                self.offered[sequence] = offered, floor
            case "rest":
                self.engine.rest(sequence)
            case "hold":
                self.engine.hold(sequence)
            case "close":
                self._close(sequence)
            case "preempt" if self.lane.scheduler.running:
                self.lane.scheduler.preempt(rng.choice(self.lane.scheduler.running), self.lane)
            case _:
                self.step()

    def _open(self, rng: random.Random) -> None:
        prompt = list(rng.choice(PROMPTS))
        on = (lambda choice: choice.token % 3 > 0) if rng.random() < 0.3 else None
        sampler = greedy() if rng.random() < 0.7 else None
        sequence = self.engine.open("m", prompt, sampler, limit=LIMIT, writes_on=on)
        self.texts[sequence] = prompt
        self.written[sequence] = set()

    def _close(self, sequence: Sequence) -> None:
        self.engine.close(sequence)
        self.offered.pop(sequence, None)
        del self.texts[sequence], self.written[sequence]

    def settle(self) -> None:
        """Nobody writes any more, and everything is computed."""
        for sequence in self.texts:
            self.engine.hold(sequence)
        for _ in range(2000):
            if not self.lane.scheduler.busy:
                break
            self.step()
        assert not self.lane.scheduler.busy
        assert not self.asked

    def check(self) -> None:
        """Everything is as if each sequence had been computed alone, at once."""
        for sequence, tokens in self.texts.items():
            assert sequence.ids.tolist() == tokens
            logits = self.logits(tokens)
            for at in self.written[sequence]:
                best = logits[at - 1]
                assert best[tokens[at]] >= best.max() - CLOSE, "not what the model would have written"
            if sequence.slot is not None:
                assert sequence.computed == len(tokens) == self.lane.kv.length(sequence.slot)
                held = self.lane.kv.export(sequence.slot, 0, len(tokens))
                assert (held - self._from_scratch(tokens)).abs().max() < CLOSE

    def _from_scratch(self, tokens: list[int]) -> Tensor:
        kv = new_kv(self.lane.model, 1 << 24)
        slot = kv.open(len(tokens))
        Runner(self.lane.model, kv).run([Segment(slot, 0, tokens)])
        return kv.export(slot, 0, len(tokens))

    def leave(self) -> None:
        """Nothing is left behind."""
        self.engine.close_all()
        scheduler, store = self.lane.scheduler, self.lane.store
        assert (scheduler.running, scheduler.waiting, self.engine.sequences) == ([], [], [])
        assert self.lane.kv.bytes_used == 0
        assert store is not None
        assert store.problems() == []
        assert store.stats().held_blocks == 0


def world(model: LocalModel, reference: Any, *, rows: int = 3) -> World:
    row_bytes = CONTEXT * KVShape.of(model).token_bytes
    kv = new_kv(model, rows * row_bytes)
    store = PrefixStore(KVIdentity("m", "w", KVLayout.of(kv.shape)), bytes_limit=row_bytes, block_tokens=8)
    lane = Lane(model, kv, Runner(model, kv), store, max_running=4, prefill_chunk=24)
    engine = Primitives({"m": lane}, None, serials=itertools.count(), arrived=0.0, salt=b"a")
    return World(lane, engine, reference)


@ON_DEVICES
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30))
@example(9966)  # one waited for ever for what another, told to rest, had not read
def test_whatever_is_done_to_sequences_equals_recomputing_them(model: LocalModel, reference: Any, seed: int) -> None:
    here, rng = world(model, reference), random.Random(seed)
    for _ in range(40):
        here.wander(rng)
    here.settle()
    here.check()
    here.leave()


@ON_DEVICES
def test_nothing_leaks_however_long_it_goes_on(model: LocalModel, reference: Any, size: Size) -> None:
    here, rng = world(model, reference), random.Random(7)
    for _ in range(size(400, 10_000)):
        here.wander(rng)
    preemptions = here.lane.scheduler.preemptions
    here.settle()
    here.check()
    here.leave()
    assert preemptions > 0, "room for three was never too little"


def test_a_step_is_timed_until_the_device_has_computed_it(
    model: LocalModel, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of a prompt asks for nothing back, so CUDA returns from it at once."""
    here, seconds = world(model, reference), [0.0]
    here.lane.model = replace(model, device=torch.device("cuda"))
    monkeypatch.setattr(here.lane, "_clock", lambda: seconds[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seconds.append(seconds.pop() + 0.25))
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(here.lane.store, "observe_prefill", lambda *step: told.append(step))
    here.engine.open("m", PROMPTS[4])
    here.lane.step()
    assert told == [(24, 0.25)]
    here.leave()


@ON_DEVICES
def test_forks_share_what_was_read(model: LocalModel, reference: Any) -> None:
    here = world(model, reference)
    prompt = here.engine.open("m", PROMPTS[2])
    while not prompt.at_rest:
        here.lane.step()
    before = here.lane.computed_tokens
    forks = [here.engine.fork(prompt, greedy()) for _ in range(2)]
    here.lane.step()
    assert here.lane.computed_tokens - before == 2, "the last token of each, for its logits"
    assert {len(fork.ids) for fork in forks} == {len(PROMPTS[2]) + 1}
    assert prompt.ids.tolist() == PROMPTS[2]
    here.leave()


@ON_DEVICES
def test_who_has_read_can_be_told_to_write(model: LocalModel, reference: Any) -> None:
    """At rest or in the middle of its text, held and let go again."""
    here = world(model, reference)
    sequence = here.engine.open("m", PROMPTS[2], limit=LIMIT)
    while not sequence.at_rest:
        here.lane.step()
    for _ in range(2):
        here.engine.write(sequence, greedy())
        for _ in range(3):
            here.lane.step()
        here.engine.hold(sequence)
        while not sequence.at_rest:
            here.lane.step()
    tokens = sequence.ids.tolist()
    assert len(tokens) == len(PROMPTS[2]) + 6
    best = here.logits(tokens)[len(PROMPTS[2]) - 1 : -1]
    chosen = best.gather(1, torch.tensor(tokens[len(PROMPTS[2]) :]).unsqueeze(1))
    assert (chosen[:, 0] >= best.amax(1) - CLOSE).all()
    here.leave()


@ON_DEVICES
@pytest.mark.parametrize("preempted", [False, True])
def test_an_offer_is_kept_up_to_what_is_too_improbable(model: LocalModel, reference: Any, preempted: bool) -> None:
    """In one pass over its tokens and the one before them; nothing of what is kept is computed again."""
    here = world(model, reference)
    sequence = here.engine.open("m", PROMPTS[2], greedy(), limit=LIMIT)
    here.engine.rest(sequence)
    assert here.lane.step() == [], "who rests does not even read"
    offered = text(9, 3)
    logprobs = torch.log_softmax(here.logits([*PROMPTS[2], *offered])[len(PROMPTS[2]) - 1 : -1], -1)
    thought = logprobs[torch.arange(9), torch.tensor(offered)]
    floor = float(thought[:5].min()) - 0.01
    offered = [*offered[:5], int(logprobs[5].argmin()), *offered[6:]]
    assert float(logprobs[5].min()) < floor
    here.engine.offer(sequence, offered, floor)
    if preempted:
        here.lane.step()
        here.lane.scheduler.preempt(sequence, here.lane)
        here.engine.offer(sequence, offered, floor)
    turns: list[Turn] = []
    while not turns:
        turns = here.lane.step()
    (kept,) = turns
    assert [choice.token for choice in kept.choices] == [*offered[:5], int(logprobs[5].argmax())]
    assert torch.allclose(torch.tensor([choice.logprob for choice in kept.choices[:5]]), thought[:5], atol=CLOSE)
    here.engine.rest(sequence)
    assert sequence.computed == len(PROMPTS[2]) + 5, "all but its own last token"
    here.leave()


@ON_DEVICES
def test_what_was_written_is_stored_for_whoever_goes_on_from_it(model: LocalModel, reference: Any) -> None:
    here = world(model, reference)
    first = here.engine.open("m", PROMPTS[1], greedy(), limit=60)
    while not first.at_rest:
        here.lane.step()
    here.engine.close(first)
    second = here.engine.open("m", [*first.ids, 7, 8, 9])
    here.lane.step()
    assert second.cached == 56, "all full blocks of its 59 computed tokens, answer included"
    here.leave()


@ON_DEVICES
def test_hidden_states_are_told_once_whatever_is_computed_again(model: LocalModel, reference: Any) -> None:
    """Preempted after every token: a part of the text is computed again each time, and told to nobody."""
    here = world(model, reference)
    sequence = here.engine.open("m", PROMPTS[1], greedy(), limit=50, taps=TapSpec((0, 3), "generated"))
    told: list[int] = []
    while not sequence.at_rest:
        for turn in here.lane.step():
            told += turn.hidden.positions if turn.hidden is not None else []
        if sequence.slot is not None and len(sequence.ids) > len(PROMPTS[1]):
            here.lane.scheduler.preempt(sequence, here.lane)
    assert told == list(range(len(PROMPTS[1]), 49))
    assert here.lane.computed_tokens > 100
    here.leave()


@ON_DEVICES
def test_a_score_computes_no_more_than_it_needs_and_changes_nothing(model: LocalModel, reference: Any) -> None:
    here = world(model, reference)
    prompt = here.engine.open("m", PROMPTS[2])
    while not prompt.at_rest:
        here.lane.step()
    before = here.lane.computed_tokens
    question = here.engine.score(prompt, [5, 6, 7])
    (turn,) = here.lane.step()
    assert turn.sequence is question
    assert turn.scores is not None
    assert len(turn.scores.logprobs) == 3
    assert here.lane.computed_tokens - before == 3, "the last token of the prompt, and two of the three"
    assert (prompt.ids.tolist(), prompt.computed) == (PROMPTS[2], len(PROMPTS[2]))
    here.leave()


@ON_DEVICES
@pytest.mark.parametrize("draft_length", [1, 4])
def test_drafts_change_no_text_whether_right_or_wrong(model: LocalModel, reference: Any, draft_length: int) -> None:
    """Half of the drafts are what the model will say, half are not; greedy and drawn."""
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=2.0, seed=3)):
        said: list[list[int]] = []
        steps: list[int] = []
        for drafting in (False, True):
            here = world(model, reference)
            sequence = here.engine.open("m", PROMPTS[1], Sampler(params, CPU), limit=60)
            while not sequence.at_rest:
                if drafting and sequence.pending == 1 and len(sequence.ids) > len(PROMPTS[1]):
                    known = said[0][len(sequence.ids) :][: min(draft_length, sequence.room)]
                    wrong = [(token + 1) % 512 for token in known]
                    sequence.draft[:] = known if here.lane.steps % 2 else [*known[:1], *wrong[1:]]
                here.lane.step()
            said.append(sequence.ids.tolist())
            steps.append(here.lane.steps)
            here.leave()
        assert said[0] == said[1]
        assert steps[1] < steps[0]


def test_limits_are_named(model: LocalModel, reference: Any) -> None:
    here = world(model, reference)
    with pytest.raises(ValueError, match="1 to 120 tokens"):
        here.engine.open("m", text(120), greedy(), limit=120)
    sequence = here.engine.open("m", PROMPTS[0], limit=10)
    with pytest.raises(ValueError, match="limit of 10"):
        here.engine.append(sequence, text(8))
    with pytest.raises(ValueError, match="from 1 to"):
        here.engine.truncate(sequence, 0)
    with pytest.raises(ValueError, match="can be scored"):
        here.engine.score(sequence, text(8))
    with pytest.raises(ValueError, match="token 512 cannot be scored: the model has tokens 0 to 511"):
        here.engine.score(sequence, [5, 512])
    here.leave()
