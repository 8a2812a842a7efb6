"""What is drawn follows the distribution that the parameters state, whatever else is in the batch."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from local_engine.sampler import Sampler, distributions, draw, pick_all, sampling_problem
from local_engine.types import SamplingParams
from tests.local_engine.devices import ON_DEVICES

CPU = torch.device("cpu")
VOCABULARY = 12


def exact(logits: list[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """The distribution as its definitions say it, in plain arithmetic."""
    counts = Counter(output)
    shaped = []
    for token, logit in enumerate(logits):
        logit += params.logit_bias.get(token, 0.0)
        if counts[token] or token in prompt:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        shaped.append(logit - params.frequency_penalty * counts[token] - params.presence_penalty * (counts[token] > 0))
    if params.temperature == 0:
        best = shaped.index(max(shaped))
        return [float(token == best) for token in range(len(shaped))]
    weights = [math.exp((logit - max(shaped)) / params.temperature) for logit in shaped]
    kept = [weight if weight >= params.min_p else 0.0 for weight in weights]
    if params.top_k > 0:
        least = sorted(kept, reverse=True)[min(params.top_k, len(kept)) - 1]
        kept = [weight if weight >= least else 0.0 for weight in kept]
    if params.top_p < 1:
        mass, least = 0.0, 0.0
        for weight in sorted(kept, reverse=True):
            if mass >= params.top_p * sum(kept):
                break
            mass, least = mass + weight, weight
        kept = [weight if weight >= least else 0.0 for weight in kept]
    return [weight / sum(kept) for weight in kept]


# Steps of 1/8 make ties, which float32 keeps; odd thresholds keep rounding away from every border.
logit_rows = st.lists(st.integers(-24, 24).map(lambda n: n / 8), min_size=VOCABULARY, max_size=VOCABULARY)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9137, 0.4391, 1e-9]),
    top_k=st.sampled_from([-1, 0, 1, 3, VOCABULARY, 100]),
    min_p=st.sampled_from([0.0, 0.0737, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.75, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.25, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-3.0, 0.5, 100.0]), max_size=2),
    seed=st.integers(),
)
requests = st.tuples(logit_rows, parameters, tokens, tokens)


@ON_DEVICES
@settings(max_examples=150, deadline=None)
@given(batch=st.lists(requests, min_size=1, max_size=5))
def test_every_row_of_a_batch_has_the_distribution_its_parameters_state(
    device: torch.device, batch: list[tuple[list[float], SamplingParams, list[int], list[int]]]
) -> None:
    logits = torch.tensor([row for row, *_ in batch], device=device)
    samplers = [Sampler(params, device, prompt_tokens=len(prompt)) for _, params, prompt, _ in batch]
    histories = [array("I", prompt + output) for *_, prompt, output in batch]
    before = logits.clone()
    found = distributions(logits, samplers, histories)
    choices = pick_all(logits, samplers, histories)
    assert torch.equal(logits, before)
    for at, (row, params, prompt, output) in enumerate(batch):
        assert found[at].tolist() == pytest.approx(exact(row, params, prompt, output), abs=2e-5)
        assert torch.equal(found[at], samplers[at].distribution(logits[at], prompt + output)), "alone as in the batch"
        assert choices[at] == pytest.approx(samplers[at].pick(logits[at], prompt + output), nan_ok=True)
        assert found[at, choices[at].token] > 0


@ON_DEVICES
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.7, top_p=0.9),
        SamplingParams(seed=3, temperature=1.3, top_k=6, min_p=0.05),
        SamplingParams(seed=4, presence_penalty=1.0, frequency_penalty=0.3, repetition_penalty=1.2),
    ],
    ids=["plain", "nucleus", "top-k", "penalties"],
)
def test_draws_follow_the_exact_distribution(device: torch.device, params: SamplingParams) -> None:
    row = [0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -2.5, 0.8, 0.8, -0.4, 1.5, -6.0]
    n, output = 6000, [1, 1, 5]
    # One history of every length: each position draws anew.
    histories = [[7] * length + output for length in range(n)]
    samplers = [Sampler(params, device, prompt_tokens=length) for length in range(n)]
    choices = pick_all(torch.tensor([row] * n, device=device), samplers, histories)
    counts = Counter(choice.token for choice in choices[1:])
    expected = exact(row, params, [7], output)
    possible = [token for token, p in enumerate(expected) if p * n >= 5]
    assert all(expected[token] > 0 for token in counts)
    seen, wanted = [counts[t] for t in possible], [expected[t] for t in possible]
    scale = sum(seen) / sum(wanted)
    assert stats.chisquare(seen, [p * scale for p in wanted]).pvalue > 0.001


@ON_DEVICES
def test_a_flat_distribution_over_many_tokens_keeps_its_whole_nucleus(device: torch.device) -> None:
    """More tokens than are looked at first."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 3000) / 4).to(device)
    for params in (SamplingParams(top_p=0.95), SamplingParams(top_k=700), SamplingParams(top_k=2000, top_p=0.8)):
        found = distributions(logits, [Sampler(params, device), Sampler(SamplingParams(top_p=0.01), device)], [[], []])
        assert found[0].tolist() == pytest.approx(exact(logits[0].tolist(), params, [], []), abs=1e-6)
        assert 1 < int((found[1] > 0).sum()) < 256


def test_many_rows_are_drawn_as_each_alone() -> None:
    """More rows than a cache holds: they go in blocks."""
    logits = torch.randn(30, 4000, generator=torch.Generator().manual_seed(3))
    samplers = [Sampler(SamplingParams(seed=row, temperature=row % 3 / 2, logprobs=True), CPU) for row in range(30)]
    histories = [[1] * row for row in range(30)]
    alone = [sampler.pick(logits[row], histories[row]) for row, sampler in enumerate(samplers)]
    assert pick_all(logits, samplers, histories) == alone


def test_the_numbers_behind_the_draws_are_uniform_and_independent() -> None:
    sampler = Sampler(SamplingParams(seed=9), CPU)
    streams = [[sampler.uniform(position, stream) for position in range(3000)] for stream in (0, 1)]
    other = [Sampler(SamplingParams(seed=10), CPU).uniform(position) for position in range(3000)]
    for numbers in (*streams, other):
        assert stats.kstest(numbers, "uniform").pvalue > 0.001
    for pair in ((streams[0], streams[1]), (streams[0], other), (streams[0][1:], streams[0][:-1])):
        assert stats.pearsonr(*pair).pvalue > 0.001
    assert Sampler(SamplingParams(seed=9 + 2**64), CPU).uniform(5) == streams[0][5]
    assert Sampler(SamplingParams(), CPU).uniform(5) != Sampler(SamplingParams(), CPU).uniform(5)


@ON_DEVICES
def test_no_number_draws_an_impossible_token(device: torch.device) -> None:
    probabilities = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.7000001, 0.0]], device=device)
    last = 1 - 2.0**-53
    assert draw(probabilities.expand(3, -1), [0.0, 0.15, last]).tolist() == [1, 2, 4]


def test_a_seed_decides_the_text_whatever_runs_beside_it() -> None:
    torch.manual_seed(1)
    rows = torch.randn(20, 40)
    mine = SamplingParams(seed=77, temperature=1.2, top_p=0.9)
    others = [
        SamplingParams(seed=1, top_k=3), SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.999999)
    ]  # fmt: skip

    def text(company: Sequence[SamplingParams], again_from: int = 0) -> list[int]:
        sampler, history = Sampler(mine, CPU), array("I", [3])
        at = 0
        while at < 20:
            logits = torch.stack([rows[at], *(rows[(at + 1) % 20] for _ in company)])
            beside = [Sampler(params, CPU) for params in company]
            history.append(pick_all(logits, [sampler, *beside], [history] * (1 + len(company)))[0].token)
            at += 1
            if at == again_from:  # preempted: everything after the fifth token is computed again
                at, again_from = 5, 0
                del history[6:]
        return list(history)

    assert text([]) == text(others) == text([], again_from=13)
    assert len(set(text([]))) > 5


@ON_DEVICES
def test_no_end_comes_before_min_tokens(device: torch.device) -> None:
    sampler = Sampler(
        SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(2,)), device, prompt_tokens=1, end_tokens={1}
    )
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0], device=device)
    assert [sampler.pick(logits, [0] + [3] * written).token for written in range(3)] == [3, 3, 1]


@ON_DEVICES
def test_logprobs_are_the_models_own(device: torch.device) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], device=device)
    params = SamplingParams(temperature=0, logprobs=True, top_logprobs=20, logit_bias={1: 50.0}, presence_penalty=1)
    quiet = Sampler(SamplingParams(temperature=0), device)
    choice, unmeasured = pick_all(logits.repeat(2, 1), [Sampler(params, device), quiet], [[0], [0]])
    probabilities = torch.softmax(logits.double(), 0)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(math.log(probabilities[1]))
    assert [token for token, _ in choice.top] == [0, 1, 2, 3]
    assert [math.exp(logprob) for _, logprob in choice.top] == pytest.approx(probabilities.tolist())
    assert choice.entropy == pytest.approx(-sum(p * math.log(p) for p in probabilities.tolist()))
    assert math.isnan(unmeasured.logprob)
    assert Sampler(SamplingParams(), device, measure=True).pick(logits, []).entropy == pytest.approx(choice.entropy)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=3, min_tokens=4), "min_tokens"),
        (SamplingParams(min_tokens=-1), "min_tokens"),
        (SamplingParams(temperature=-1), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(temperature=1e39), "temperature must be from 0 to 1000000"),
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(top_k=-2), "top_k"),
        (SamplingParams(min_p=1.1), "min_p"),
        (SamplingParams(presence_penalty=2.1), "presence_penalty"),
        (SamplingParams(frequency_penalty=math.nan), "frequency_penalty"),
        (SamplingParams(repetition_penalty=0), "repetition_penalty"),
        (SamplingParams(repetition_penalty=1e-38), "repetition_penalty must be from 0.1 to 10"),
        (SamplingParams(logit_bias={1: 101}), "logit_bias"),
        (SamplingParams(logit_bias={50: 1}), "logit_bias"),
        (SamplingParams(stop_token_ids=(-1,)), "stop_token_ids"),
        (SamplingParams(top_logprobs=21), "top_logprobs"),
        (SamplingParams(stop=("",)), "stop"),
    ],
)
def test_bad_sampling_parameters_are_named(params: SamplingParams, name: str) -> None:
    assert name in (sampling_problem(params, 50) or "")
    assert sampling_problem(SamplingParams(min_tokens=3), 50) is None


def test_whatever_is_allowed_at_once_draws_a_token_that_there_is() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0, -math.inf]])
    for temperature in (0.0, 1e-5, 1e6):
        params = SamplingParams(
            temperature=temperature, repetition_penalty=0.1, presence_penalty=-2, frequency_penalty=-2, min_p=1.0,
            logit_bias={0: 100.0, 1: -100.0}, seed=1,
        )  # fmt: skip
        assert sampling_problem(params, 4) is None
        assert Sampler(params, torch.device("cpu"), prompt_tokens=1).pick(logits[0], [1, 0, 0, 1]).token in range(4)
    assert draw(torch.full((1, 4), math.nan), [0.5]).item() in range(4)
