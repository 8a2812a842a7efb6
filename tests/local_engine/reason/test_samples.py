"""Votes on the bundled model."""

import dataclasses
from typing import Any

import pytest

from local_engine.model import LocalModel
from local_engine.plan_types import Exit, PlanUse, Vote
from local_engine.types import Finished, SamplingParams, TapSpec, TextFormat
from tests.local_engine.engine_harness import Caller, StartEngine, Watch
from tests.local_engine.spec.test_spec_engine import drafting

ASKED = "What is 83 * 7 + 45?"
HARD = "Can you tell me what 73 * 8 + 30 * 55 + 15 * 8 + 46 - (594 mod 7) - 75 + 57 is?"
DRAWN = SamplingParams(temperature=0.7, seed=1, max_tokens=200)
WILD = SamplingParams(temperature=1.5, seed=1, max_tokens=300)


def use(finished: Finished) -> PlanUse:
    assert finished.plan is not None
    return finished.plan


def test_samples_that_agree_end_the_vote(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate(ASKED, DRAWN, plan=Vote())
    end = caller.finished(id)
    assert caller.content(id) == "The answer is 626."
    assert [sample.answer for sample in use(end).samples] == ["626"] * 3
    assert all(sample.over for sample in use(end).samples)
    shown = use(end).shown
    assert shown is not None
    told = sum(delta.tokens for delta in caller.deltas(id))
    assert end.output_tokens == sum(sample.tokens for sample in use(end).samples)
    assert use(end).samples[shown].tokens == told + 1, "the end of the turn has no text"
    assert use(end).discarded_tokens == end.output_tokens - use(end).samples[shown].tokens


def test_the_prompt_is_read_once(bundled: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    caller = Caller(start_engine(bundled, make_runner=watch, prefix_bytes=0))
    end = caller.finished(caller.generate(ASKED, DRAWN, plan=Vote()))
    computed = sum(sum(sizes) for sizes in watch.sizes)
    assert use(end).models[0].computed_tokens == computed
    # Of each sample: the prompt's last token, and all that it wrote but the last.
    assert computed == end.input_tokens + end.output_tokens


def test_samples_are_those_of_n_choices(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    voted = use(caller.finished(caller.generate(HARD, WILD, plan=Vote(most=4, stop="never"))))
    plain = caller.generate(HARD, WILD, n=4)
    assert [sample.tokens for sample in voted.samples] == [caller.finished(plain, n).output_tokens for n in range(4)]


def test_no_more_than_most_are_drawn_where_none_agree(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate(HARD, WILD, plan=Vote(most=5, bound=0.999))
    assert len(use(caller.finished(id)).samples) == 5


def test_an_exit_holds_for_every_sample(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(temperature=0.7, seed=1, max_tokens=200, effort="high")
    id = caller.generate(ASKED, sampling, plan=Vote(exit=Exit(rule="cue")))
    assert "Wait" not in caller.reasoning(id)
    end = caller.finished(id)
    assert use(end).forced_tokens > 0
    assert end.output_tokens == sum(sample.tokens for sample in use(end).samples) + use(end).forced_tokens
    whole = caller.finished(caller.generate(ASKED, sampling, plan=Vote()))
    assert end.output_tokens < 0.7 * whole.output_tokens


def test_a_format_holds_for_every_sample(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(
        temperature=0.7, seed=1, max_tokens=200, response_format=TextFormat("regex", "[0-9]{1,4}")
    )
    id = caller.generate(ASKED, sampling, plan=Vote(most=3))
    assert caller.content(id).isdigit()
    assert all(sample.answer.isdigit() for sample in use(caller.finished(id)).samples)


def test_hopeless_samples_are_given_up(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(temperature=1.0, seed=2, max_tokens=100)
    whole = use(caller.finished(caller.generate("What is 83 * 77 + 45?", sampling, plan=Vote())))
    # Its samples doubt one digit: of 5, with -0.68, or of 4, with -0.71.
    pruned = use(caller.finished(caller.generate("What is 83 * 77 + 45?", sampling, plan=Vote(prune=-0.7))))
    given_up = [sample for sample in pruned.samples if not sample.over]
    assert given_up
    for sample in given_up:
        assert (sample.answer, sample.lowest < -0.7) == ("", True)
        assert sample.tokens < min(other.tokens for other in whole.samples)


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        pytest.param({"stop": ("answer",)}, Vote(most=4, stop="never"), id="stop string"),
        pytest.param(
            {"max_tokens": 30, "effort": "high"}, Vote(most=4, stop="never", exit=Exit(rule="cue")), id="max_tokens"
        ),
        pytest.param({"response_format": TextFormat("regex", "[0-9]{1,4}")}, Vote(most=4, stop="never"), id="format"),
        pytest.param({"effort": "high"}, Vote(most=4, stop="never", exit=Exit(rule="cue")), id="exit"),
        pytest.param({"effort": "high"}, Vote(most=4, stop="never", exit=Exit(rule="redundancy")), id="tried answers"),
    ],
)
def test_a_vote_is_the_same_however_drafts_fall(
    bundled: LocalModel, start_engine: StartEngine, options: dict[str, Any], plan: Vote
) -> None:
    """A step with drafts brings several tokens; those after an end, or after a cut of the thought, are void."""
    sampling = SamplingParams(**{"temperature": 0.9, "seed": 1, "max_tokens": 200, **options})
    plain, drafted = Caller(start_engine(bundled)), Caller(start_engine(bundled, make_speculator=drafting("twin")))
    ids = plain.generate(ASKED, sampling, plan=plan), drafted.generate(ASKED, sampling, plan=plan)
    one, other = plain.finished(ids[0]), drafted.finished(ids[1])
    assert other.accepted_tokens > 0
    assert drafted.content(ids[1]) == plain.content(ids[0])
    assert (other.output_tokens, other.reasoning_tokens) == (one.output_tokens, one.reasoning_tokens)
    assert use(other).models[0].output_tokens == use(one).models[0].output_tokens
    assert (use(other).discarded_tokens, use(other).shown) == (use(one).discarded_tokens, use(one).shown)
    for guessed, quiet in zip(use(other).samples, use(one).samples, strict=True):
        assert (guessed.answer, guessed.tokens, guessed.over) == (quiet.answer, quiet.tokens, quiet.over)
        assert guessed.tokens <= (sampling.max_tokens or 0)
        assert (guessed.logprob, guessed.lowest) == pytest.approx((quiet.logprob, quiet.lowest), abs=1e-3)


def test_who_leaves_frees_every_sample(bundled: LocalModel, endless: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch(gated=True)
    engine = start_engine(endless, make_runner=watch)
    caller = Caller(engine)
    id = caller.generate(ASKED, DRAWN, plan=Vote())
    watch.allow(6)
    watch.wait_for_pass(7)
    caller.cancel(id)
    watch.allow(10_000)
    end = caller.finished(id)
    assert end.finish_reason == "cancelled"
    assert end.output_tokens == sum(sample.tokens for sample in use(end).samples) > 0
    assert engine.stats().kv_bytes == 0


def test_at_its_deadline_a_vote_is_counted_as_it_stands(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(dataclasses.replace(bundled, end_tokens=frozenset())))
    id = caller.generate(ASKED, DRAWN, plan=Vote(), deadline_s=0.0)
    assert caller.finished(id).finish_reason == "deadline"
    assert caller.content(id) == ""


@pytest.mark.parametrize(
    ("sampling", "options", "problem"),
    [
        (SamplingParams(temperature=0), {"plan": Vote()}, "temperature is 0"),
        (DRAWN, {"plan": Vote(), "n": 2}, "not n = 2"),
        (DRAWN, {"plan": Vote(most=0)}, "plan.most must be from 1"),
        (DRAWN, {"plan": Vote(bound=1.0)}, "plan.bound must be between"),
        (DRAWN, {"plan": Vote(prune=0.5)}, "plan.prune is a natural logarithm"),
        (DRAWN, {"plan": Vote(exit=Exit(rule="trace"))}, "cannot be traced"),
        (DRAWN, {"plan": Vote(), "taps": TapSpec((1,))}, "cannot be tapped"),
        (DRAWN, {"plan": Vote(exit=Exit(agree=1))}, "plan.agree"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(
    bundled: LocalModel, start_engine: StartEngine, sampling: SamplingParams, options: dict[str, Any], problem: str
) -> None:
    caller = Caller(start_engine(bundled))
    failure = caller.failed(caller.generate(ASKED, sampling, **options))
    assert failure.code == "invalid_request"
    assert problem in failure.message
