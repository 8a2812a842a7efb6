"""Speculation in a running engine: nothing that a caller is told differs, but for the counts and the time."""

import dataclasses
import json
from collections.abc import Iterator
from collections.abc import Sequence as Sized
from pathlib import Path

import msgspec
import pytest

from local_engine.engine import Engine
from local_engine.kv import KVCache
from local_engine.model import LocalModel, load_model
from local_engine.runner import Runner, new_kv
from local_engine.sequence import Sequence
from local_engine.spec.build import MakeSpeculator, without_speculation
from local_engine.spec.chain import ExitProposer, ModelProposer
from local_engine.spec.draft import Draft, Weigh
from local_engine.spec.ngram import NGramProposer
from local_engine.spec.recycle import RecycleProposer
from local_engine.spec.speculator import Speculator
from local_engine.types import Delta, Event, Finished, SamplingParams, TapSpec
from tests.local_engine import small_tokenizers
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.engine_harness import GREEDY, Caller, StartEngine, Watch
from tests.local_engine.spec.spec_harness import flat_speculator

QUESTIONS = ["What is 3 + 4?", "Anna has 12 apples. She buys 7 more. How many apples are there now?", "17*7+3+15-66?"]
KINDS = ["free", "twin", "exit"]
SEEDED = SamplingParams(temperature=1.3, seed=11, max_tokens=40)
Drafted = tuple[Caller, Engine]


def drafting(kind: str) -> MakeSpeculator:
    """Drafts whatever it costs."""

    def make(name: str, model: LocalModel, kv: KVCache) -> Speculator:
        if kind == "twin":
            return flat_speculator(drafter=ModelProposer("twin", Runner(model, new_kv(model, 1 << 26)), 512))
        if kind == "exit":
            return flat_speculator(drafter=ExitProposer(4, Runner(model, kv)))
        return flat_speculator(NGramProposer(), RecycleProposer())

    return make


@pytest.fixture
def plain(bundled: LocalModel, start_engine: StartEngine) -> Caller:
    return Caller(start_engine(bundled))


@pytest.fixture(params=KINDS)
def drafted(request: pytest.FixtureRequest, bundled: LocalModel, start_engine: StartEngine) -> Iterator[Drafted]:
    """A caller of an engine that drafts, and has."""
    engine = start_engine(bundled, make_speculator=drafting(request.param))
    yield Caller(engine), engine
    assert engine.stats().drafted_tokens > 0


def told(caller: Caller, id: int) -> list[Event]:
    """All that was told, without the counts of drafts and the numbers of logprobs."""
    events: list[Event] = []
    for event in caller.wait(id):
        if isinstance(event, Finished):
            event = msgspec.structs.replace(event, id=0, drafted_tokens=0, accepted_tokens=0, cached_tokens=0)
        elif isinstance(event, Delta):
            logprobs = [
                msgspec.structs.replace(token, logprob=0.0, entropy=None, top=[(text, 0.0) for text, _ in token.top])
                for token in event.logprobs
            ]
            event = msgspec.structs.replace(event, id=0, logprobs=logprobs)
        events.append(event)
    return events


@ON_DEVICES
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SEEDED,
        SamplingParams(temperature=0, stop=("er is",)),
        SamplingParams(temperature=0, logprobs=True, top_logprobs=2),
        SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=0.3, max_tokens=40),
        SamplingParams(temperature=0, effort="high"),
    ],
    ids=["greedy", "seeded", "stop", "logprobs", "penalties", "thinks twice"],
)
def test_every_event_is_that_of_plain_decoding(sampling: SamplingParams, plain: Caller, drafted: Drafted) -> None:
    caller, _ = drafted
    for _ in range(2):  # the second time, recycling knows the text
        ids = [caller.generate(question, sampling) for question in QUESTIONS]
        expected = [plain.generate(question, sampling) for question in QUESTIONS]
        assert [told(caller, id) for id in ids] == [told(plain, id) for id in expected]


@ON_DEVICES
def test_logprobs_are_those_of_plain_decoding(plain: Caller, drafted: Drafted) -> None:
    caller, _ = drafted
    caller.finished(caller.generate(QUESTIONS[0]))
    sampling = SamplingParams(temperature=0, logprobs=True, top_logprobs=2)
    found = [
        [
            number
            for event in one.wait(one.generate(QUESTIONS[0], sampling))
            if isinstance(event, Delta)
            for token in event.logprobs
            for number in (token.logprob, token.entropy or 0.0, *(logprob for _, logprob in token.top))
        ]
        for one in (caller, plain)
    ]
    assert found[0]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_max_tokens_end_a_run_of_accepted_tokens(plain: Caller, drafted: Drafted) -> None:
    caller, _ = drafted
    caller.finished(caller.generate(QUESTIONS[1]))
    for most in range(1, 12):
        sampling = SamplingParams(temperature=0, max_tokens=most)
        id, expected = caller.generate(QUESTIONS[1], sampling), plain.generate(QUESTIONS[1], sampling)
        assert caller.finished(id).output_tokens == most
        assert told(caller, id) == told(plain, expected)


def test_choices_of_one_prompt_are_those_of_plain_decoding(plain: Caller, drafted: Drafted) -> None:
    caller, _ = drafted
    ids = [one.generate(QUESTIONS[0], SEEDED, n=3) for one in (caller, plain)]
    by_choice = [
        sorted(msgspec.json.encode(event) for event in told(one, id))
        for one, id in zip((caller, plain), ids, strict=True)
    ]
    assert by_choice[0] == by_choice[1]


@ON_DEVICES
def test_hidden_states_are_of_the_tokens_that_were_told(plain: Caller, drafted: Drafted) -> None:
    caller, _ = drafted
    caller.finished(caller.generate(QUESTIONS[0]))
    positions = []
    for one in (caller, plain):
        id = one.generate(QUESTIONS[0], GREEDY, taps=TapSpec((2,), where="generated"))
        deltas = [event for event in one.wait(id) if isinstance(event, Delta)]
        positions.append([at for delta in deltas for tapped in delta.tapped for at in tapped.positions])
    assert positions[0] == positions[1]


def test_drafts_are_counted_for_the_request_and_for_the_engine(drafted: Drafted) -> None:
    caller, engine = drafted
    finished = [caller.finished(caller.generate(QUESTIONS[2])) for _ in range(2)]
    assert finished[1].accepted_tokens > 0
    assert finished[1].accepted_tokens <= finished[1].drafted_tokens
    stats = engine.stats()
    assert stats.drafted_tokens == sum(end.drafted_tokens for end in finished)
    assert stats.accepted_tokens == sum(end.accepted_tokens for end in finished)


def test_a_run_takes_fewer_passes(bundled: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    caller = Caller(start_engine(bundled, make_speculator=drafting("free"), make_runner=watch))
    caller.finished(caller.generate(QUESTIONS[2]))
    before = len(watch.passes)
    finished = caller.finished(caller.generate(QUESTIONS[2]))
    assert len(watch.passes) - before < finished.output_tokens / 2


def test_only_accepted_tokens_are_stored_as_prefixes(bundled: LocalModel, start_engine: StartEngine) -> None:
    """A next turn that repeats the answer hits as much as it does without drafts."""
    endless = dataclasses.replace(bundled, end_tokens=frozenset())
    cached = []
    for make in (without_speculation, drafting("free"), drafting("twin")):
        caller = Caller(start_engine(endless, make_speculator=make))
        first = SamplingParams(temperature=0, max_tokens=64, effort="none")
        for _ in range(2):
            said = caller.content(caller.generate(QUESTIONS[1], first))
        turns = [{"role": "user", "content": QUESTIONS[1]}, {"role": "assistant", "content": said}]
        turns.append({"role": "user", "content": "And now?"})
        id = caller.generate(json.dumps(turns).encode(), SamplingParams(temperature=0, max_tokens=4))
        cached.append((said, caller.finished(id).cached_tokens))
    assert cached[0] == cached[1] == cached[2]


@ON_DEVICES
def test_many_requests_in_little_memory_are_those_of_plain_decoding(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    """Preemption, cancels and drafts together; the engine's fixture sees that nothing is left behind."""
    row = new_kv(bundled, 1 << 30).token_bytes * 256
    answers = []
    for make in (without_speculation, drafting("free"), drafting("exit")):
        caller = Caller(start_engine(bundled, make_speculator=make, kv_bytes=2 * row, prefix_bytes=0))
        ids = [caller.generate(QUESTIONS[at % 3], msgspec.structs.replace(SEEDED, seed=at)) for at in range(9)]
        caller.cancel(ids[4])
        caller.wait(ids[4])
        answers.append([told(caller, id) for id in ids if id != ids[4]])
    assert answers[0] == answers[1] == answers[2]


def test_a_drafter_that_fails_ends_no_request_and_drafts_for_the_next(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    class FailsOnce(ModelProposer):
        failures = 0

        def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
            if not self.failures:
                self.failures += 1
                raise RuntimeError("made to fail")
            return super().propose(sequences, most, weigh)

    def make(name: str, model: LocalModel, kv: KVCache) -> Speculator:
        return flat_speculator(drafter=FailsOnce("twin", Runner(model, new_kv(model, 1 << 26)), 512))

    caller = Caller(start_engine(bundled, make_speculator=make))
    first, second = (caller.generate(QUESTIONS[0]) for _ in range(2))
    assert caller.content(first) == "The answer is 7."
    assert caller.finished(first).drafted_tokens == 0
    third = caller.generate(QUESTIONS[0])
    assert caller.finished(third).drafted_tokens > 0
    assert caller.content(second) == caller.content(third) == "The answer is 7."


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_smaller_vocabulary_cannot_say_costs_nobody_else_his_drafts(
    temperature: float, tmp_path: Path, start_engine: StartEngine
) -> None:
    """Embeddings are padded to different sizes; a bias can have a model write a token that its drafter has not."""
    size = len(small_tokenizers.byte_level())
    wide = load_model("wide", str(small_tokenizers.save_model(tmp_path / "wide", vocabulary=size + 16)))
    small = load_model("small", str(small_tokenizers.save_model(tmp_path / "small")))

    def make(name: str, model: LocalModel, kv: KVCache) -> Speculator:
        return flat_speculator(drafter=ModelProposer("small", Runner(small, new_kv(small, 1 << 26)), size + 16))

    caller = Caller(start_engine(wide, make_speculator=make))

    def drafts(bias: dict[int, float]) -> int:
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=60, min_tokens=20, logit_bias=bias)
        return caller.finished(caller.generate("hello", params)).drafted_tokens

    known = dict.fromkeys(range(size, size + 16), -100.0)
    assert [drafts(known) > 0, drafts({size + 9: 100.0}), drafts(known) > 0] == [True, 0, True]


def test_a_step_that_rests_is_plain_decoding(bundled: LocalModel, start_engine: StartEngine) -> None:
    """Whoever is asked or told something in it fails."""

    class Asleep(Speculator):
        def rests(self, running: int) -> bool:
            return True

        propose = learns = learn = None  # type: ignore[assignment]

    caller = Caller(start_engine(bundled, make_speculator=lambda *_: Asleep()))
    assert caller.content(caller.generate(QUESTIONS[0])) == "The answer is 7."
