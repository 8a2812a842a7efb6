"""Verification gives the text that plain sampling gives: the same tokens by agreement, the same law by rejection."""

import itertools
from array import array
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy.stats import chisquare

from local_engine.sampler import Sampler, distributions, draw
from local_engine.spec.draft import UNWEIGHED, Draft, Proposer
from local_engine.spec.ngram import NGramProposer
from local_engine.spec.recycle import RecycleProposer
from local_engine.spec.verify import DRAFT_STREAM, Window, verify
from local_engine.types import SamplingParams
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.spec.spec_harness import writing

CPU = torch.device("cpu")
VOCABULARY = 5
TEXTS = 1500
LENGTH = 3
PROMPT = (0, 1, 2, 0, 1)
Drafting = Callable[[Sequence[Sampler], Sequence["array[int]"]], list[Draft]]
PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "cut": SamplingParams(temperature=0.7, top_p=0.9),
    "penalised": SamplingParams(temperature=1.2, presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.3),
}


def table(seed: int) -> torch.Tensor:
    """A model: logits of the next token by the two before it."""
    return torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 1.5


MODEL = table(1)
DRAFTER = MODEL + 0.8 * table(2)


def logits_after(model: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
    return model[history[-2], history[-1]]


class OddTokens:
    """A constraint: no token twice in a row."""

    def mask(self, logits: torch.Tensor, output: Sequence[int]) -> None:
        assert all(one != other for one, other in itertools.pairwise(output)), "a draft that may not be was read on"
        if len(output):
            logits[output[-1]] = -torch.inf

    def done(self, output: Sequence[int]) -> bool:
        return False


def from_proposer(make: Callable[[], Proposer]) -> Drafting:
    """Drafts of a real proposer, which learned from what the model holds likely."""
    proposer = make()
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        taught = writing([*PROMPT, first, second], SAMPLER)
        proposer.observe(taught, len(taught.ids), [], [int(MODEL[first, second].argmax())])

    def drafts(samplers: Sequence[Sampler], histories: Sequence["array[int]"]) -> list[Draft]:
        sequences = [writing(history, sampler) for sampler, history in zip(samplers, histories, strict=True)]
        return proposer.propose(sequences, 3, UNWEIGHED)

    return drafts


def on(device: torch.device, distributions: torch.Tensor | None) -> torch.Tensor | None:
    return None if distributions is None else distributions.to(device)


def by_model(*, drawn: bool) -> Drafting:
    """Drafts of another model, sampled with the same parameters: drawn from its distribution, or its choices.

    It goes on for as long as it is sure of what comes next, as drafting models do to save time.
    """

    def drafts(samplers: Sequence[Sampler], histories: Sequence["array[int]"]) -> list[Draft]:
        found = []
        for sampler, history in zip(samplers, histories, strict=True):
            tokens: list[int] = []
            rows: list[torch.Tensor] = []
            for _ in range(3):
                before = history + array("i", tokens)
                logits = logits_after(DRAFTER, before)
                rows.append(distributions(logits.unsqueeze(0), [sampler], [before])[0])
                if tokens and float(rows[-1].max()) < 0.45:
                    rows.pop()
                    break
                if drawn:
                    tokens.append(int(draw(rows[-1].unsqueeze(0), [sampler.uniform(len(before), DRAFT_STREAM)])))
                else:
                    tokens.append(sampler.pick(logits, before).token)
            found.append(Draft(tokens, [0] * len(tokens), torch.stack(rows) if drawn else None))
        return found

    return drafts


SAMPLER = Sampler(SamplingParams(temperature=0), CPU)
DRAFTINGS: dict[str, Callable[[], Drafting]] = {
    "none": lambda: lambda samplers, _: [Draft([], []) for _ in samplers],
    "ngram": lambda: from_proposer(NGramProposer),
    "recycle": lambda: from_proposer(RecycleProposer),
    "model, drawn": lambda: by_model(drawn=True),
    "model, chosen": lambda: by_model(drawn=False),
}


def write(
    params: SamplingParams, drafting: Drafting, texts: int, *, constrained: bool, device: torch.device = CPU
) -> list[tuple[int, ...]]:
    """The first tokens of as many texts, each with its own seed, verified side by side; also how often drafts held."""
    samplers = [
        Sampler(
            SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__} | {"seed": seed}),
            device,
            OddTokens() if constrained else None,
            prompt_tokens=len(PROMPT),
        )
        for seed in range(texts)
    ]
    histories = [array("i", PROMPT) for _ in samplers]
    while unfinished := [at for at, history in enumerate(histories) if len(history) < len(PROMPT) + LENGTH]:
        drafts = drafting([samplers[at] for at in unfinished], [histories[at] for at in unfinished])
        windows = [
            Window(samplers[at], histories[at], draft.tokens, on(device, draft.distributions))
            for at, draft in zip(unfinished, drafts, strict=True)
        ]
        rows = [logits_after(MODEL, window.before(row)) for window in windows for row in range(window.rows)]
        for window, run in zip(windows, verify(torch.stack(rows).to(device), windows), strict=True):
            window.history.extend(choice.token for choice in run)
    return [tuple(history[len(PROMPT) : len(PROMPT) + LENGTH]) for history in histories]


def law(params: SamplingParams, *, constrained: bool) -> dict[tuple[int, ...], float]:
    """The probability of each text of LENGTH tokens, by multiplying."""
    sampler = Sampler(params, CPU, OddTokens() if constrained else None, prompt_tokens=len(PROMPT))
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for text, probability in texts.items():
            history = array("i", [*PROMPT, *text])
            following = sampler.distribution(logits_after(MODEL, history), history)
            longer |= {(*text, token): probability * float(share) for token, share in enumerate(following) if share > 0}
        texts = longer
    return texts


@pytest.mark.parametrize(
    ("drafting", "params", "constrained"),
    [
        ("ngram", "plain", False),
        ("recycle", "cut", False),
        ("recycle", "plain", True),
        ("model, chosen", "penalised", False),
        ("model, drawn", "plain", False),
        ("model, drawn", "cut", False),
        ("model, drawn", "cut", True),
        ("model, drawn", "penalised", True),
    ],
)
def test_texts_have_the_law_of_plain_sampling(drafting: str, params: str, constrained: bool) -> None:
    texts = write(PARAMS[params], DRAFTINGS[drafting](), TEXTS, constrained=constrained)
    expected = law(PARAMS[params], constrained=constrained)
    assert set(texts) <= set(expected), "a text that plain sampling never gives"
    frequent = [text for text, probability in expected.items() if probability * TEXTS >= 8]
    observed = [texts.count(text) for text in frequent]
    predicted = [expected[text] * TEXTS for text in frequent]
    observed.append(TEXTS - sum(observed))
    predicted.append(max(TEXTS - sum(predicted), 1e-9))
    scale = TEXTS / sum(predicted)
    assert chisquare(observed, [count * scale for count in predicted]).pvalue > 1e-3


@ON_DEVICES
@pytest.mark.parametrize("drafting", ["ngram", "recycle", "model, chosen"])
@pytest.mark.parametrize("params", [*PARAMS, "greedy"])
def test_agreement_gives_token_for_token_what_the_seed_gives(device: torch.device, drafting: str, params: str) -> None:
    how = PARAMS.get(params, SamplingParams(temperature=0))
    plain = write(how, DRAFTINGS["none"](), 60, constrained=False)
    assert write(how, DRAFTINGS[drafting](), 60, constrained=False, device=device) == plain


@ON_DEVICES
def test_greedy_rejection_is_plain_greedy(device: torch.device) -> None:
    how = SamplingParams(temperature=0)
    plain = write(how, DRAFTINGS["none"](), 1, constrained=False)
    assert write(how, DRAFTINGS["model, drawn"](), 1, constrained=False, device=device) == plain


@ON_DEVICES
def test_drafts_are_kept_as_often_as_the_distributions_overlap(device: torch.device) -> None:
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], device=device)
    kept = 0
    for seed in range(4000):
        sampler = Sampler(SamplingParams(seed=seed), device)
        history = array("i", [0])
        drafted = int(draw(q.unsqueeze(0), [sampler.uniform(1, DRAFT_STREAM)]))
        kept += len(verify(p.log().repeat(2, 1), [Window(sampler, history, [drafted], q.unsqueeze(0))])[0]) - 1
    assert kept / 4000 == pytest.approx(0.6, abs=0.03)  # sum of min(p, q)


def test_choices_of_a_kept_draft_are_measured_like_others() -> None:
    """To the bit, which sums on CUDA give only where as many rows are summed."""
    params = SamplingParams(temperature=0, logprobs=True, top_logprobs=2)
    sampler, history = Sampler(params, CPU), array("i", PROMPT)
    best = int(logits_after(MODEL, history).argmax())
    rows = torch.stack([logits_after(MODEL, [*history, *tail]) for tail in ((), (best,))])
    certain = torch.nn.functional.one_hot(torch.tensor([best]), VOCABULARY).float()
    expected = [sampler.pick(rows[0], history), sampler.pick(rows[1], history + array("i", [best]))]
    for proposed in (None, certain):
        assert verify(rows, [Window(sampler, history, [best], proposed)])[0] == expected


def test_rows_and_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="the windows have 2 rows, the logits 1"):
        verify(MODEL[0, :1], [Window(SAMPLER, array("i", PROMPT), [1])])
