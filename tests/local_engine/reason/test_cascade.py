"""A small model answers first: what is sent, what is abandoned, and that nobody sees an attempt that failed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from local_engine.arithmetic import problems
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.plan_types import AcceptRule, Cascade, PlanUse
from local_engine.reason.accept import AnswerWatch, abandons, accepts, p_correct, price_of_going_on
from local_engine.types import Delta, Finished, SamplingParams, TapSpec
from tests.local_engine.engine_harness import GREEDY, Caller, Watch
from tests.local_engine.reason.test_speculate import watched
from tests.local_engine.spec.test_spec_engine import drafting

StartEngines = Callable[..., Engine]
QUESTIONS = [problem.question for level in (1, 4) for problem in problems(6, level, 3)]
ALWAYS = AcceptRule(weights={}, bias=0.0, at_least=0.0)
NEVER = AcceptRule(weights={}, bias=-1e9, at_least=1.0)
SURE = AcceptRule(weights={"min_logprob": 1.0}, bias=1.0, at_least=0.5)
"""Accepts where no token is less probable than 1 / e."""


@pytest.fixture(scope="module")
def pair(bundled: LocalModel) -> dict[str, LocalModel]:
    return {"base": bundled, "draft": load_model("draft", "bundled/nano", dtype="float32", device="cpu")}


def plan(rule: AcceptRule, **options: Any) -> Cascade:
    return Cascade(draft="draft", accept=rule, **options)


def ask(caller: Caller, text: str, model: str = "base", **options: Any) -> tuple[str, Finished]:
    """(thought and answer, how it ended)"""
    events = caller.wait(caller.generate(text, options.pop("sampling", GREEDY), model=model, **options))
    last = events[-1]
    assert isinstance(last, Finished), last
    return "".join(event.reasoning + "|" + event.content for event in events if isinstance(event, Delta)), last


def use(finished: Finished) -> PlanUse:
    assert finished.plan is not None
    return finished.plan


def test_an_accepted_answer_is_the_small_models_and_costs_nothing_else(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    caller = Caller(start_engines(pair))
    for question in QUESTIONS:
        text, alone = ask(caller, question, model="draft")
        got, finished = ask(caller, question, plan=plan(ALWAYS))
        did = use(finished)
        assert (got, finished.output_tokens, finished.finish_reason) == (text, alone.output_tokens, "stop")
        assert not did.escalated
        base, draft = did.models
        assert (base.computed_tokens, base.read_tokens, base.input_tokens, did.discarded_tokens) == (0, 0, 0, 0)
        assert draft.read_tokens + draft.cached_tokens == draft.input_tokens == alone.input_tokens
        assert (draft.output_tokens, draft.reasoning_tokens) == (alone.output_tokens, alone.reasoning_tokens)
        assert did.accepted_tokens == did.drafted_tokens == alone.output_tokens


def test_an_attempt_that_is_not_accepted_is_not_seen(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    caller = Caller(start_engines(pair))
    for question in QUESTIONS:
        text, alone = ask(caller, question)
        got, finished = ask(caller, question, plan=plan(NEVER))
        did = use(finished)
        assert (got, finished.output_tokens) == (text, alone.output_tokens)
        assert did.escalated
        assert did.p_correct == 0.0
        assert did.discarded_tokens == did.drafted_tokens == did.models[1].output_tokens > 0
        base, _ = did.models
        assert base.computed_tokens <= alone.input_tokens + alone.output_tokens
        assert base.read_tokens + base.cached_tokens == base.input_tokens == alone.input_tokens
        assert (base.output_tokens, base.reasoning_tokens) == (alone.output_tokens, alone.reasoning_tokens)


def test_an_attempt_is_abandoned_where_it_is_not_worth_its_end(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    """Once the least probable token is under the rule's bound nothing can save it."""
    watching = AcceptRule(
        weights=SURE.weights, bias=1.0, at_least=0.5,
        prospect_weights={"min_logprob": 100.0}, prospect_bias=100.0, go_on_above=0.5,
    )  # fmt: skip
    caller = Caller(start_engines(pair))
    abandoned = 0
    for question in QUESTIONS:
        patient, hasty = (ask(caller, question, plan=plan(rule)) for rule in (SURE, watching))
        assert patient[0] == hasty[0]
        whole, part = use(patient[1]), use(hasty[1])
        assert whole.escalated == part.escalated == part.abandoned
        if part.abandoned:
            abandoned += 1
            assert part.p_correct is None
            assert part.drafted_tokens < whole.drafted_tokens
    assert 0 < abandoned < len(QUESTIONS)


def test_hidden_states_are_read_where_the_small_model_was_least_sure(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    """What the plan says of P(correct) is what the states that a tap brings come to."""
    layers = (1, 2)
    weights = tuple(math.sin(at) / 50 for at in range(2 * 96))
    rule = AcceptRule(
        weights={"min_logprob": 0.5}, bias=0.1, at_least=0.0, hidden_layers=layers, hidden_weights=weights
    )
    sampling = SamplingParams(temperature=0, effort="none", logprobs=True)
    caller = Caller(start_engines(pair, prefix_bytes=0))
    seen = set()
    for question in QUESTIONS:
        _, judged = ask(caller, question, plan=plan(rule), sampling=sampling)
        taps = TapSpec(layers, "generated")
        events = caller.wait(caller.generate(question, sampling, model="draft", taps=taps))
        told = [event for event in events if isinstance(event, Delta)]
        sure = [one.logprob for event in told for one in event.logprobs]
        tapped = [one for event in told for one in event.tapped]
        states = np.concatenate([np.frombuffer(one.data, "<f2").reshape(-1, 2 * 96) for one in tapped])
        assert len(states) == len(sure), "all but the end of the turn, which is written and not read"
        at = int(np.argmin(sure))
        seen.add(at)
        score = 0.1 + 0.5 * min(sure) + float(np.dot(states[at].astype(np.float64), weights))
        assert use(judged).p_correct == pytest.approx(1 / (1 + math.exp(-score)), abs=2e-3)
    assert len(seen) > 1, "not always the same token"


def test_p_correct_is_the_same_however_drafts_fall(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    """A step with drafts brings several tokens, and the hidden states of some of them."""
    weights = tuple(math.sin(at) / 50 for at in range(2 * 96))
    rule = AcceptRule(
        weights={"min_logprob": 0.5}, bias=0.1, at_least=0.0, hidden_layers=(1, 2), hidden_weights=weights
    )
    plain = Caller(start_engines(pair, prefix_bytes=0))
    drafted = Caller(start_engines(pair, prefix_bytes=0, make_speculator=drafting("twin")))
    for question in QUESTIONS:
        quiet, guessed = (use(ask(caller, question, plan=plan(rule))[1]) for caller in (plain, drafted))
        assert guessed.p_correct == pytest.approx(quiet.p_correct, abs=2e-3)
        assert guessed.drafted_tokens == quiet.drafted_tokens


def test_an_offered_attempt_is_read_in_one_pass_and_kept_as_far_as_it_is_good(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    """With a floor that no token reaches, it is read, and the answer is the larger model's own."""
    caller = Caller(start_engines(pair, prefix_bytes=0))
    for question in QUESTIONS:
        text, alone = ask(caller, question)
        got, strict = ask(caller, question, plan=plan(NEVER, hint="offer", floor=1.0))
        assert got == text
        assert use(strict).accepted_tokens == 0
        base = use(strict).models[0]
        assert base.output_tokens == alone.output_tokens
        _, lax = ask(caller, question, plan=plan(NEVER, hint="offer", floor=-1e6))
        base = use(lax).models[0]
        # A slow machine reads a long offer in several steps, and writes a token in each of them.
        assert use(lax).accepted_tokens + base.output_tokens == lax.output_tokens
        assert base.output_tokens <= lax.output_tokens // 4
        assert base.read_tokens == base.input_tokens + use(lax).accepted_tokens
        assert base.reasoning_tokens <= min(base.output_tokens, lax.reasoning_tokens)
        assert base.computed_tokens == base.input_tokens + lax.output_tokens - 1


def test_both_go_on_where_an_offered_attempt_ends(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    """The text is the larger model's own, for fewer of its tokens than if it had gone on alone."""
    caller, written, whole = Caller(start_engines(pair, prefix_bytes=0)), 0, 0
    for question in QUESTIONS:
        text, alone = ask(caller, question)
        got, finished = ask(caller, question, plan=plan(NEVER, hint="offer"))
        assert got == text
        did = use(finished)
        base, draft = did.models
        assert did.escalated
        assert did.drafted_tokens == draft.output_tokens
        assert base.output_tokens + did.accepted_tokens == finished.output_tokens == alone.output_tokens
        assert did.discarded_tokens == did.drafted_tokens - did.accepted_tokens
        written, whole = written + base.output_tokens, whole + alone.output_tokens
    assert written < whole / 2


def test_drafts_change_nothing_of_what_an_abandoned_attempt_costs(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    """What a step brought after the token at which it was abandoned is nobody's, and read where it is needed."""
    hasty = AcceptRule(
        weights={}, bias=0.0, at_least=1.0,
        prospect_weights={"log_tokens": -100.0}, prospect_bias=170.0, go_on_above=0.5,
    )  # fmt: skip
    plain = Caller(start_engines(pair, prefix_bytes=0))
    drafted = Caller(start_engines(pair, prefix_bytes=0, make_speculator=drafting("twin")))
    for question in QUESTIONS:
        ends = [ask(caller, question, plan=plan(hasty, hint="offer"))[1] for caller in (plain, drafted)]
        assert use(ends[0]).abandoned
        quiet, guessed = (
            [(model.read_tokens, model.output_tokens, model.reasoning_tokens) for model in use(end).models]
            for end in ends
        )
        assert guessed == quiet


def test_what_a_failing_model_wrote_is_offered_too(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    watch = Watch()
    watch.fails = lambda segments: len(watch.passes) > 8
    text, _ = ask(Caller(start_engines(pair)), QUESTIONS[0])
    engine = start_engines(pair, make_runner=watched(watch, "draft"))
    got, finished = ask(Caller(engine), QUESTIONS[0], plan=plan(NEVER, hint="offer"))
    assert got == text
    assert "made to fail" in use(finished).degraded
    assert use(finished).drafted_tokens == 8
    assert use(finished).accepted_tokens > 0


def test_a_small_model_that_fails_costs_its_attempt(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    watch = Watch()
    watch.fails = lambda segments: len(watch.passes) > 3
    text, _ = ask(Caller(start_engines(pair)), QUESTIONS[0])
    got, finished = ask(
        Caller(start_engines(pair, make_runner=watched(watch, "draft"))), QUESTIONS[0], plan=plan(ALWAYS)
    )
    assert got == text
    assert "made to fail" in use(finished).degraded
    assert use(finished).drafted_tokens == 3


def test_an_answer_without_an_end_is_not_accepted(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    short = SamplingParams(temperature=0, max_tokens=6)
    caller = Caller(start_engines(pair))
    text, _ = ask(caller, QUESTIONS[0], sampling=short)
    got, finished = ask(caller, QUESTIONS[0], sampling=short, plan=plan(ALWAYS))
    assert (got, finished.finish_reason) == (text, "length")
    assert use(finished).escalated


@pytest.mark.parametrize("ends", [True, False], ids=["its own end", "no end"])
@pytest.mark.parametrize("hint", ["none", "offer"])
def test_an_attempt_ends_at_a_stop_string(
    start_engines: StartEngines, pair: dict[str, LocalModel], ends: bool, hint: str
) -> None:
    """P(correct) is of what would be sent: of n tokens, n / (n + 1) by this rule."""
    long = AcceptRule(weights={"log_tokens": 1.0}, bias=0.0, at_least=0.5)
    bias = {} if ends else dict.fromkeys(pair["draft"].end_tokens, -100.0)
    sampling = SamplingParams(temperature=0, max_tokens=200, stop=("h",), logit_bias=bias)
    caller = Caller(start_engines(pair))
    for question in QUESTIONS[:3]:
        text, alone = ask(caller, question, model="draft", sampling=sampling)
        got, finished = ask(caller, question, sampling=sampling, plan=plan(long, hint=hint))
        did = use(finished)
        assert (got, finished.output_tokens, finished.stopped_by) == (text, alone.output_tokens, "h")
        assert (finished.finish_reason, finished.reasoning_tokens) == ("stop", alone.reasoning_tokens)
        assert not did.escalated
        assert (did.models[1].output_tokens, did.discarded_tokens) == (alone.output_tokens, 0)
        assert did.models[1].reasoning_tokens == alone.reasoning_tokens
        assert did.p_correct == pytest.approx(alone.output_tokens / (alone.output_tokens + 1))


@pytest.mark.parametrize("ends", [True, False], ids=["its own end", "no end"])
@pytest.mark.parametrize("hint", ["none", "offer"])
def test_an_attempt_that_is_not_accepted_was_written_up_to_its_stop_string(
    start_engines: StartEngines, pair: dict[str, LocalModel], ends: bool, hint: str
) -> None:
    """The larger model keeps all of what it is offered, by this floor, so nothing more is written after it."""
    bias = {} if ends else dict.fromkeys(pair["draft"].end_tokens, -100.0)
    sampling = SamplingParams(temperature=0, max_tokens=200, stop=("h",), logit_bias=bias)
    caller = Caller(start_engines(pair))
    for question in QUESTIONS[:3]:
        _, alone = ask(caller, question, model="draft", sampling=sampling)
        _, finished = ask(caller, question, sampling=sampling, plan=plan(NEVER, hint=hint, floor=-1e6))
        did = use(finished)
        assert (did.escalated, did.p_correct, finished.finish_reason) == (True, 0.0, "stop")
        assert did.drafted_tokens == did.models[1].output_tokens == alone.output_tokens
        written = sum(model.output_tokens for model in did.models)
        assert written - did.discarded_tokens == finished.output_tokens


@pytest.mark.parametrize("name", ["draft", "m"])
def test_a_caller_who_leaves_is_let_go(start_engines: StartEngines, pair: dict[str, LocalModel], name: str) -> None:
    watch = Watch(gated=True)
    caller = Caller(start_engines(pair, make_runner=watched(watch, name)))
    id = caller.generate(QUESTIONS[0], GREEDY, model="base", plan=plan(NEVER))
    watch.allow(2)
    watch.wait_for_pass(3)
    caller.cancel(id)
    watch.allow(1)
    finished = caller.finished(id)
    assert finished.finish_reason == "cancelled"
    assert use(finished).models[1].output_tokens > 0
    assert not any(isinstance(event, Delta) and event.content for event in caller.wait(id))


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        pytest.param(AcceptRule(weights={}, bias=0.0, at_least=1.5), {}, "at_least", id="no probability"),
        pytest.param(AcceptRule(weights={}, bias=math.nan, at_least=0.5), {}, "finite", id="no number"),
        pytest.param(
            AcceptRule(weights={}, bias=0.0, at_least=0.5, go_on_above=0.1), {}, "prospect_weights", id="by nothing"
        ),
        pytest.param(
            AcceptRule(weights={}, bias=0.0, at_least=0.5, hidden_layers=(1, 3), hidden_weights=(0.0,) * 192),
            {},
            "from 0 to 2",
            id="no such layer",
        ),
        pytest.param(
            AcceptRule(weights={}, bias=0.0, at_least=0.5, hidden_layers=(1, 2), hidden_weights=(0.0,) * 96),
            {},
            "96 for each of 2",
            id="weights of one layer",
        ),
        pytest.param(ALWAYS, {"n": 2}, "one choice", id="two choices"),
    ],
)
def test_contradictions_are_refused(
    start_engines: StartEngines, pair: dict[str, LocalModel], rule: AcceptRule, options: dict[str, Any], says: str
) -> None:
    caller = Caller(start_engines(pair))
    failed = caller.failed(caller.generate("1 + 1?", GREEDY, model="base", plan=plan(rule), **options))
    assert (failed.code, failed.param) == ("invalid_request", "plan")
    assert says in failed.message


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_tokens() -> None:
    watch = AnswerWatch()
    for logprob, entropy in ((-0.5, 0.1), (-2.0, 0.7), (-0.1, 0.1)):
        watch.push(logprob, entropy)
    assert watch.features() == pytest.approx(
        {
            "mean_logprob": -2.6 / 3,
            "min_logprob": -2.0,
            "mean_entropy": 0.3,
            "max_entropy": 0.7,
            "log_tokens": math.log(3),
        }
    )
    assert p_correct(SURE, watch) == pytest.approx(1 / (1 + math.e))
    assert not accepts(SURE, watch)


def test_what_cannot_be_judged_is_not_accepted() -> None:
    rule = AcceptRule(weights={"min_logprob": 1.0}, bias=9.0, at_least=0.5)
    assert p_correct(rule, AnswerWatch()) == 0.0
    odd = AnswerWatch()
    odd.push(-math.inf)
    assert not accepts(rule, odd)
    assert not abandons(rule, odd), "nothing says when"


def test_going_on_has_a_price() -> None:
    assert price_of_going_on(10, 1.0, saved=100.0) == 0.1
    assert price_of_going_on(10, 1.0, saved=0.0) == 1.0
    assert price_of_going_on(500, 1.0, saved=100.0) == 1.0
