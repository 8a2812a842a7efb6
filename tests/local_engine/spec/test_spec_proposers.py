"""Every kind of draft, over real networks: the text is that of plain decoding, and no KV is left behind."""

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sized

import pytest
import torch

from local_engine import kernels
from local_engine.errors import ModelLoadError
from local_engine.model import LocalModel, load_model
from local_engine.runner import Runner, Segment, new_kv
from local_engine.sampler import Sampler
from local_engine.sequence import Sequence
from local_engine.spec.chain import ExitProposer, ModelProposer, check_vocabulary
from local_engine.spec.draft import UNWEIGHED, Unweighed, Worth
from local_engine.spec.ngram import NGramProposer
from local_engine.spec.recycle import RecycleProposer
from local_engine.spec.speculator import Speculator
from local_engine.types import SamplingParams
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.runner_harness import BUDGET, CONTEXT, text, tiny_model, tiny_network
from tests.local_engine.spec.spec_harness import decode, flat_speculator, slot, writing

CPU = torch.device("cpu")
VOCABULARY = 512
PROMPTS = [text(20, seed=1), text(7, seed=2), [5, 6, 7, 8] * 6]
COUNT = 24
Make = Callable[[LocalModel, Runner], Speculator]


def new_runner(model: LocalModel, budget: int = BUDGET) -> Runner:
    return Runner(model, new_kv(model, budget))


def cousin(model: LocalModel, noise: float) -> LocalModel:
    """Nearly the same model: drafts that are often right."""
    network = tiny_network("qwen3")
    torch.manual_seed(7)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(noise * weights.abs().mean() * torch.randn_like(weights))
    return dataclasses.replace(model, network=network.to(model.device))


def model_drafter(model: LocalModel, noise: float) -> ModelProposer:
    return ModelProposer("cousin", new_runner(cousin(model, noise)), VOCABULARY)


KINDS: dict[str, Make] = {
    "ngram": lambda model, runner: flat_speculator(NGramProposer()),
    "recycle": lambda model, runner: flat_speculator(RecycleProposer()),
    "ngram and recycle": lambda model, runner: flat_speculator(NGramProposer(), RecycleProposer()),
    "draft": lambda model, runner: flat_speculator(drafter=model_drafter(model, 0.3)),
    "twin": lambda model, runner: flat_speculator(drafter=model_drafter(model, 0.0)),
    "exit": lambda model, runner: flat_speculator(drafter=ExitProposer(2, runner)),
    "all": lambda model, runner: flat_speculator(NGramProposer(), RecycleProposer(), drafter=model_drafter(model, 0.3)),
}


@pytest.fixture
def model(bundled: LocalModel) -> LocalModel:
    return tiny_model("qwen3", bundled)


@ON_DEVICES
@pytest.mark.parametrize("seed", [None, 3], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_plain_decoding(kind: str, seed: int | None, model: LocalModel) -> None:
    params = SamplingParams(temperature=0) if seed is None else SamplingParams(temperature=0.1, seed=seed)
    runner = new_runner(model)
    samplers = [Sampler(params, CPU, prompt_tokens=len(prompt)) for prompt in PROMPTS]
    plain = decode(runner, PROMPTS, samplers, COUNT)
    assert (plain.passes, plain.drafted) == (COUNT, 0)
    speculator = KINDS[kind](model, runner)
    first, second = (decode(runner, PROMPTS, samplers, COUNT, speculator) for _ in range(2))
    assert first.texts == second.texts == plain.texts
    assert first.drafted > 0
    assert runner.kv.bytes_used == 0
    if kind == "twin" and seed is None:
        assert first.accepted == first.drafted
        assert first.passes <= 1 + COUNT // 3
    elif kind in ("recycle", "all") and seed is None:
        assert second.passes < COUNT / 2, "the second time it knows the text"


@ON_DEVICES
def test_drawn_drafts_of_a_twin_are_always_kept(model: LocalModel) -> None:
    runner = new_runner(model)
    samplers = [Sampler(SamplingParams(temperature=1.0), CPU) for _ in PROMPTS]
    decoded = decode(runner, PROMPTS, samplers, COUNT, KINDS["twin"](model, runner))
    assert decoded.accepted == decoded.drafted >= COUNT


@ON_DEVICES
def test_a_drafting_model_reads_a_long_prompt_in_parts_and_leaves_no_kv(model: LocalModel) -> None:
    runner = new_runner(cousin(model, 0.0))
    drafter = ModelProposer("twin", runner, VOCABULARY, read_chunk=100)
    sequence = writing(text(250), Sampler(SamplingParams(temperature=0), CPU))
    lengths = [len(drafter.propose([sequence], 3, UNWEIGHED)[0].tokens) for _ in range(4)]
    assert lengths == [0, 0, 3, 3]
    assert drafter.propose([sequence], CONTEXT - 249, UNWEIGHED)[0].tokens == [], "the last is over the window"
    drafter.forget(sequence)
    assert runner.kv.bytes_used == 0


@ON_DEVICES
def test_a_drafting_model_without_room_drafts_for_those_it_has_room_for(model: LocalModel) -> None:
    small = cousin(model, 0.0)
    row = new_kv(small, BUDGET).token_bytes * 256
    drafter = ModelProposer("small", new_runner(small, row), VOCABULARY)
    sequences = [writing(text(20, seed), Sampler(SamplingParams(temperature=0), CPU)) for seed in range(2)]
    assert [len(draft.tokens) for draft in drafter.propose(sequences, 3, UNWEIGHED)] == [3, 0]
    drafter.forget(sequences[0])
    assert [len(draft.tokens) for draft in drafter.propose(sequences[1:], 3, UNWEIGHED)] == [3]


class Told(Unweighed):
    """Says in turn what it was told to say."""

    def __init__(self, verdicts: Iterable[Worth]) -> None:
        self._verdicts = iter(verdicts)

    def __call__(self, sequences: Sized[Sequence], grades: Sized[Sized[int]]) -> Worth:
        return next(self._verdicts)


def test_drafting_ends_where_it_is_told_to(model: LocalModel) -> None:
    drafter = model_drafter(model, 0.0)
    sequence = writing(text(20), Sampler(SamplingParams(temperature=0.1, seed=1), CPU))
    for verdicts, length in (([Worth.LEAVE], 0), ([Worth.LAST], 1), ([Worth.GO_ON, Worth.GO_ON, Worth.LEAVE], 2)):
        assert len(drafter.propose([sequence], 6, Told(verdicts))[0].tokens) == length


class Floor(Unweighed):
    floor = 0.9


@pytest.mark.skipif(not kernels.made_for(torch.float32), reason="this CPU is not one for our kernels")
def test_a_drafter_that_is_in_doubt_ends_its_draft_alone() -> None:
    """Favourites are drafted in a call of their own, each as long as its drafter is sure of it."""
    model = load_model("m", "bundled/nano", dtype="float32", device="cpu")
    runner = new_runner(model)
    drafter = ModelProposer("itself", runner, VOCABULARY)
    sequences = [writing(text(20, seed), Sampler(SamplingParams(temperature=0), CPU)) for seed in range(3)]
    whole = drafter.propose(sequences, 6, UNWEIGHED)
    cut = drafter.propose(sequences, 6, Floor())
    assert [len(draft.tokens) for draft in whole] == [6, 6, 6]
    assert [draft.tokens for draft in cut] == [draft.tokens[:1] for draft in whole], "it is never as sure as that"
    for sequence, draft in zip(sequences, whole, strict=True):  # half of it kept, then another token
        sequence.ids.extend([*draft.tokens[:3], 9])
    assert runner.writes_alone
    kept = drafter.propose(sequences, 4, UNWEIGHED)
    fresh = ModelProposer("itself", Runner(model, new_kv(model, BUDGET)), VOCABULARY)
    assert [draft.tokens for draft in kept] == [draft.tokens for draft in fresh.propose(sequences, 4, UNWEIGHED)]


@pytest.mark.skipif(not kernels.made_for(torch.float32), reason="this CPU is not one for our kernels")
def test_an_exit_drafts_the_same_by_our_kernels_and_keeps_nothing_of_it() -> None:
    drafts = []
    for fused in (True, False):
        model = load_model("m", "bundled/nano", dtype="float32", device="cpu")
        runner = Runner(model, new_kv(model, BUDGET), fused=fused)
        assert runner.writes_alone == fused
        prompts = [text(20, seed) for seed in range(3)]
        sequences = [
            writing(prompt, Sampler(SamplingParams(temperature=0), CPU), runner.kv.open(40)) for prompt in prompts
        ]
        runner.run([Segment(slot(sequence), 0, sequence.ids[:-1]) for sequence in sequences])
        drafts.append([draft.tokens for draft in ExitProposer(1, runner).propose(sequences, 5, UNWEIGHED)])
        assert [runner.kv.length(slot(sequence)) for sequence in sequences] == [19, 19, 19]
    assert drafts[0] == drafts[1]
    assert [len(tokens) for tokens in drafts[0]] == [5, 5, 5]


def test_an_exit_leaves_the_kv_as_it_was(model: LocalModel) -> None:
    runner = new_runner(model)
    sequence = writing(text(20), Sampler(SamplingParams(temperature=0), CPU), runner.kv.open(20))
    exit_layer = ExitProposer(1, runner)
    assert exit_layer.propose([sequence], 4, UNWEIGHED)[0].tokens == [], "nothing was read"
    assert runner.kv.length(slot(sequence)) == 0
    with pytest.raises(ModelLoadError, match="exit:3 must name a layer from 1 to 2"):
        ExitProposer(3, runner)


def test_a_model_of_another_vocabulary_is_refused(model: LocalModel) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    check_vocabulary(model, model)
    with pytest.raises(ModelLoadError, match="their vocabularies differ"):
        check_vocabulary(dataclasses.replace(model, tokenizer=Other()), model)
