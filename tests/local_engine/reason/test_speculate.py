"""Two models share a thought: what is shown, what is computed, and what becomes of it when something goes wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from local_engine.arithmetic import problems
from local_engine.engine import Engine
from local_engine.kv import KVCache
from local_engine.model import LocalModel, load_model
from local_engine.plan_types import PlanUse, SpeculateSteps
from local_engine.runner import Runner, new_kv
from local_engine.spec.build import speculators
from local_engine.spec.chain import ModelProposer
from local_engine.spec.ngram import NGramProposer
from local_engine.spec.recycle import RecycleProposer
from local_engine.spec.speculator import Speculator
from local_engine.types import Delta, Finished, SamplingParams
from tests.local_engine.engine_harness import GREEDY, Caller, Watch, WatchedRunner
from tests.local_engine.small_tokenizers import byte_level
from tests.local_engine.spec.spec_harness import flat_speculator

StartEngines = Callable[..., Engine]
QUESTIONS = [problem.question for level in (1, 3, 4) for problem in problems(5, level, 3)]
ALONE = 1.0
"""As the threshold of `score`, a log-probability: no token has it, so the base writes everything."""
METHODS = ("score", "specreason", "glimprouter", "speculative_thinking", "entropy")


@pytest.fixture(scope="module")
def pair(bundled: LocalModel) -> dict[str, LocalModel]:
    return {"base": bundled, "draft": load_model("draft", "bundled/nano", dtype="float32", device="cpu")}


def plan(method: Any = "score", **options: Any) -> SpeculateSteps:
    return SpeculateSteps(draft="draft", method=method, **options)


def ask(caller: Caller, text: str, sampling: SamplingParams = GREEDY, **options: Any) -> tuple[str, str, Finished]:
    """(thought, answer, how it ended)"""
    id = caller.generate(text, sampling, model="base", **options)
    events = caller.wait(id)
    deltas = [event for event in events if isinstance(event, Delta)]
    last = events[-1]
    assert isinstance(last, Finished), last
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas), last


def use(finished: Finished) -> PlanUse:
    assert finished.plan is not None
    return finished.plan


@pytest.mark.parametrize("repair", ["token", "step"])
def test_what_base_accepts_nothing_of_is_its_own_text(
    start_engines: StartEngines, pair: dict[str, LocalModel], repair: Any
) -> None:
    caller = Caller(start_engines(pair))
    for question in QUESTIONS:
        thought, answer, alone = ask(caller, question)
        got = ask(caller, question, plan=plan(threshold=ALONE, repair=repair))
        assert got[:2] == (thought, answer)
        assert got[2].output_tokens == alone.output_tokens
        assert use(got[2]).accepted_tokens == 0
        assert use(got[2]).discarded_tokens == use(got[2]).drafted_tokens > 0


@pytest.mark.parametrize("options", [{}, {"unsure": None, "lookahead": 1}], ids=["default", "plain"])
def test_by_default_the_text_is_bases_own(
    start_engines: StartEngines, pair: dict[str, LocalModel], options: dict[str, Any]
) -> None:
    """What is more probable than not is the first choice: at temperature 0 the plan saves time and changes nothing."""
    caller, passes = Caller(start_engines(pair)), 0
    for question in QUESTIONS:
        alone = ask(caller, question)
        got = ask(caller, question, plan=plan(**options))
        assert got[:2] == alone[:2]
        passes += alone[2].output_tokens - use(got[2]).models[0].output_tokens
    assert passes > 100, "base made far fewer passes"


def test_each_model_reads_what_is_accepted_once(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    """Prompt, text and what was taken back: no pass over anything that the KV holds."""
    caller = Caller(start_engines(pair, prefix_bytes=0))
    accepted = 0
    for question in QUESTIONS:
        _, _, finished = ask(caller, question, plan=plan())
        did = use(finished)
        base, draft = did.models
        accepted += did.accepted_tokens
        rejected = did.drafted_tokens - did.accepted_tokens
        text = finished.output_tokens
        assert base.output_tokens + did.accepted_tokens == text
        assert base.read_tokens + base.output_tokens - 1 <= base.computed_tokens
        assert base.input_tokens + did.accepted_tokens <= base.read_tokens
        assert base.read_tokens <= base.input_tokens + did.drafted_tokens
        assert base.input_tokens + text - 1 <= base.computed_tokens <= base.input_tokens + text + rejected
        assert draft.computed_tokens <= draft.input_tokens + text + rejected
        assert did.discarded_tokens == rejected
        assert did.accepted_steps <= did.drafted_steps
    assert accepted > 100, "the draft was of use"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(start_engines: StartEngines, pair: dict[str, LocalModel], method: Any) -> None:
    caller = Caller(start_engines(pair))
    for question in QUESTIONS[:4]:
        thought, answer, finished = ask(caller, question, plan=plan(method))
        assert finished.finish_reason == "stop"
        assert thought.count("=") >= 1
        assert answer.startswith("The answer is")
        did = use(finished)
        assert (
            did.models[0].output_tokens + did.models[1].output_tokens - did.discarded_tokens == finished.output_tokens
        )
        assert did.degraded == did.closed_by == ""


def test_ratings_decide_for_specreason(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    caller = Caller(start_engines(pair))
    for question in QUESTIONS[:3]:
        alone = ask(caller, question)
        strict = ask(caller, question, plan=plan("specreason", threshold=9.1))
        lax = ask(caller, question, plan=plan("specreason", threshold=0.0))
        assert strict[:2] == alone[:2]
        assert use(strict[2]).accepted_steps == 0
        assert use(lax[2]).accepted_steps == use(lax[2]).drafted_steps > 0


def test_first_steps_can_be_left_to_base(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    caller = Caller(start_engines(pair))
    alone, _, _ = ask(caller, QUESTIONS[-1])
    thought, _, finished = ask(caller, QUESTIONS[-1], plan=plan(threshold=-1e6, base_steps=2))
    first_two = len("\n\n".join(alone.split("\n\n")[:2]))
    assert thought[:first_two] == alone[:first_two]
    assert use(finished).accepted_tokens > 0


def test_it_composes_with_token_speculation(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    kinds = {"base": "auto", "draft": "auto"}
    plain, both = (
        Caller(start_engines(pair, make_speculator=speculators(how, {})))
        for how in (dict.fromkeys(kinds, "off"), kinds)
    )
    for question in QUESTIONS:
        assert ask(plain, question, plan=plan(repair="step"))[:2] == ask(both, question, plan=plan(repair="step"))[:2]


@pytest.mark.parametrize("guesser", ["twin", "free"])
@pytest.mark.parametrize("method", METHODS)
def test_token_speculation_changes_nothing_of_what_is_paid_for(
    start_engines: StartEngines, pair: dict[str, LocalModel], method: Any, guesser: str
) -> None:
    """Rows that verified guesses of the engine's own are nobody's text, whether they were right or wrong."""

    def twin(name: str, model: LocalModel, kv: KVCache) -> Speculator:
        return flat_speculator(drafter=ModelProposer("twin", Runner(model, new_kv(model, 1 << 26)), 512))

    def free(name: str, model: LocalModel, kv: KVCache) -> Speculator:
        return flat_speculator(NGramProposer(), RecycleProposer())

    make = {"twin": twin, "free": free}[guesser]
    plain = Caller(start_engines(pair, prefix_bytes=0))
    both = Caller(start_engines(pair, prefix_bytes=0, make_speculator=make))
    computed = 0
    for question in QUESTIONS[:6]:
        both_ways = plan(method, repair="step")  # so that base writes some of it by any method
        one, other = (use(ask(caller, question, plan=both_ways)[2]) for caller in (plain, both))
        for quiet, guessed in zip(one.models, other.models, strict=True):
            paid = [(did.read_tokens, did.output_tokens, did.reasoning_tokens) for did in (quiet, guessed)]
            assert paid[0] == paid[1]
            assert quiet.read_tokens >= quiet.input_tokens
            computed += guessed.computed_tokens - quiet.computed_tokens
    assert computed > 0, "guesses were verified"


def test_many_at_a_time_in_little_room(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    """Their KV is taken away and computed again; the text is the same."""
    alone = [ask(Caller(start_engines(pair)), question)[:2] for question in QUESTIONS]
    engine = start_engines(pair, kv_bytes=3 * 256 * 2 * 6 * 3 * 32 * 4, prefix_bytes=0)
    caller = Caller(engine)
    ids = [caller.generate(question, GREEDY, model="base", plan=plan(threshold=ALONE)) for question in QUESTIONS]
    for id, expected in zip(ids, alone, strict=True):
        deltas = [event for event in caller.wait(id) if isinstance(event, Delta)]
        assert ("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)) == expected
    assert engine.stats().preemptions > 0


def test_a_thought_over_its_budget_is_closed_and_answered(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    thought, answer, finished = ask(Caller(start_engines(pair)), QUESTIONS[-1], plan=plan(max_thinking_tokens=9))
    did = use(finished)
    assert (did.closed_by, did.forced_tokens) == ("budget", 2)
    assert finished.reasoning_tokens == 10, "the closing tag counts"
    assert "The answer is" in answer
    assert len(thought) < 30


def test_a_thought_that_never_ends_is_closed_once_it_repeats(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    """Its end is forbidden: both models go on checking for ever."""
    never = SamplingParams(temperature=0, logit_bias={pair["base"].end_think_token or 0: -100.0}, max_tokens=600)
    _, answer, finished = ask(Caller(start_engines(pair)), QUESTIONS[0], never, plan=plan(threshold=-1.6))
    assert use(finished).closed_by in ("repeats", "reflections")
    assert answer.startswith("The answer is")
    assert finished.finish_reason == "stop"


def test_a_model_without_tags_is_speculated_on_all_the_same(
    start_engines: StartEngines, pair: dict[str, LocalModel]
) -> None:
    bare = {name: dataclasses.replace(model, think_token=None, end_think_token=None) for name, model in pair.items()}
    caller = Caller(start_engines(bare))
    alone = ask(caller, QUESTIONS[-1])
    thought, answer, finished = ask(caller, QUESTIONS[-1], plan=plan(threshold=ALONE, max_thinking_tokens=3))
    assert thought == ""
    assert answer == alone[1]
    assert finished.finish_reason == "stop"
    assert use(finished).closed_by == ""


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def watched(watch: Watch, name: str) -> Callable[[LocalModel, KVCache], Any]:
    """Watches one of the models; the other runs as ever."""

    def make(model: LocalModel, kv: KVCache) -> Any:
        runner: WatchedRunner = watch(model, kv)
        return runner if model.card.name == name else runner._runner

    return make


def test_a_draft_that_dies_leaves_base_alone(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    alone = ask(Caller(start_engines(pair)), QUESTIONS[-1])
    watch = Watch()
    watch.fails = lambda segments: len(watch.passes) > 6
    caller = Caller(start_engines(pair, make_runner=watched(watch, "draft")))
    thought, answer, finished = ask(caller, QUESTIONS[-1], plan=plan(threshold=ALONE))
    assert (thought, answer) == alone[:2]
    assert "made to fail" in use(finished).degraded
    assert use(finished).drafted_tokens > 0, "it died in the middle of a step"
    assert len(watch.passes) == 7, "and is not asked again"


def test_a_base_that_dies_ends_the_request(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    watch = Watch()
    watch.fails = lambda segments: len(watch.passes) > 2
    caller = Caller(start_engines(pair, make_runner=watched(watch, "m")))
    assert caller.failed(caller.generate(QUESTIONS[-1], GREEDY, model="base", plan=plan())).code == "internal"


@pytest.mark.parametrize("name", ["m", "draft"])
def test_a_caller_who_leaves_in_a_step_is_let_go(
    start_engines: StartEngines, pair: dict[str, LocalModel], name: str
) -> None:
    """While the base reads, or the draft writes; the fixture looks that nothing is left behind."""
    watch = Watch(gated=True)
    caller = Caller(start_engines(pair, make_runner=watched(watch, name)))
    id = caller.generate(QUESTIONS[-1], GREEDY, model="base", plan=plan())
    watch.allow(3)
    watch.wait_for_pass(4)
    caller.cancel(id)
    watch.allow(1)
    finished = caller.finished(id)
    assert finished.finish_reason == "cancelled"
    assert use(finished).models[0].computed_tokens > 0
    assert len(watch.passes) == 4


@pytest.mark.parametrize(
    ("options", "sampling", "says"),
    [
        pytest.param({"plan": SpeculateSteps(draft="base")}, GREEDY, "smaller model", id="itself"),
        pytest.param({"plan": plan(), "n": 2}, GREEDY, "one choice", id="two choices"),
        pytest.param({"plan": plan(lookahead=0)}, GREEDY, "plan.lookahead", id="no step"),
        pytest.param({"plan": plan(max_step_tokens=0)}, GREEDY, "plan.max_step_tokens", id="empty steps"),
        pytest.param({"plan": plan("specreason", cue="")}, GREEDY, "plan.cue", id="no cue"),
        pytest.param(
            {"plan": plan(max_thinking_tokens=50)},
            SamplingParams(temperature=0, max_tokens=50),
            "plan.max_thinking_tokens",
            id="no room to answer",
        ),
        pytest.param({"plan": plan()}, SamplingParams(logprobs=True), "log-probabilities", id="logprobs"),
        pytest.param({"plan": plan(), "tools_json": b"[]"}, GREEDY, "tools", id="tools"),
    ],
)
def test_contradictions_are_refused(
    start_engines: StartEngines,
    pair: dict[str, LocalModel],
    options: dict[str, Any],
    sampling: SamplingParams,
    says: str,
) -> None:
    caller = Caller(start_engines(pair))
    failed = caller.failed(caller.generate("1 + 1?", sampling, model="base", **options))
    assert (failed.code, failed.param) == ("invalid_request", "plan")
    assert says in failed.message


def test_a_draft_that_is_not_there_is_named(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    caller = Caller(start_engines(pair))
    failed = caller.failed(caller.generate("1?", GREEDY, model="base", plan=SpeculateSteps(draft="gone")))
    assert (failed.code, failed.param) == ("invalid_request", "plan")
    assert "gone" in failed.message


def test_a_draft_with_other_tokens_is_refused(start_engines: StartEngines, pair: dict[str, LocalModel]) -> None:
    other = byte_level(specials=("<|im_end|>",))
    other.chat_template = pair["base"].tokenizer.chat_template
    models = {**pair, "draft": dataclasses.replace(pair["draft"], tokenizer=other)}
    caller = Caller(start_engines(models))
    failed = caller.failed(caller.generate("1 + 1?", GREEDY, model="base", plan=plan()))
    assert (failed.code, failed.param) == ("invalid_request", "plan")
    assert "same tokenizer" in failed.message
