"""Objectives beyond the cheapest: worth, time, thresholds; and what a caller's hints leave of a policy."""

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from probes.types import Estimate
from routers.choose import weigh
from routers.decide import decide
from routers.errors import NoCandidate, PolicyError
from routers.explain import to_lines
from routers.load import parse
from routers.options import Option
from routers.placement import latency_ms, ttft_ms_p95, wait_ms
from routers.policy import Policy
from routers.types import Decision, Hints, Load, Query, Signals, State

HEAD = """\
version: 1
providers:
  remote: {base_url: https://h/v1}
models:
  weak:   {provider: remote, model: w, context: 8000, max_output: 2000, price: {input: $1/Mtok, output: $2/Mtok}}
  middle: {provider: remote, model: m, context: 8000, max_output: 2000, price: {input: $3/Mtok, output: $6/Mtok}}
  strong: {provider: remote, model: s, context: 100000, price: {input: $10/Mtok, output: $20/Mtok}}
signals:
  difficulty: {probe: default, heads: {weak: weak, middle: middle, strong: strong}}
routes:
"""
NAMES = ("weak", "middle", "strong")
ASKED = Query("auto", "tenant", 100, None, input_tokens_max=100)


def policy(**lines: str) -> Policy:
    fields = {"when": "{model: auto}", "candidates": "[weak, middle, strong]"} | lines
    return parse(HEAD + "  - name: auto\n" + "".join(f"    {key}: {value}\n" for key, value in fields.items()))


def measured(*p: float | None) -> Signals:
    known = {name: value for name, value in zip(NAMES, p, strict=True) if value is not None}
    return Signals({name: Estimate(value, f"a@1/{name}") for name, value in known.items()}, probe="ok")


def run(of: Policy, signals: Signals = Signals(), state: State = State(), query: Query = ASKED) -> Decision:
    return decide(query, signals, of, state, 0)


def attempt(of: Policy, signals: Signals, query: Query) -> Decision | NoCandidate:
    try:
        return run(of, signals, query=query)
    except NoCandidate as refused:
        return refused


def reasons(decision: Decision) -> dict[str, str]:
    return {candidate.model: candidate.rejected for candidate in decision.candidates}


# Worth

UTILITY = {"objective": "utility", "worth": "{point: $0.0002}"}


def test_a_point_of_quality_buys_so_much() -> None:
    """Of 100 tokens in and 400 out: $0.0009, $0.0027 and $0.009."""
    bought = run(policy(**UTILITY), measured(0.5, 0.6, 0.99))
    assert (bought.plan.model, bought.rule) == ("strong", "utility at $0.0002/point")
    assert reasons(bought)["weak"] == "worth $0.0091, strong $0.0108"
    assert {c.model: c.utility_nanousd for c in bought.candidates}["middle"] == 12_000_000 - 2_700_000
    assert run(policy(**UTILITY), measured(0.9, 0.95, 0.99)).plan.model == "weak"
    assert run(policy(**UTILITY, subject_to='{p_success: ">= 0.95"}'), measured(0.9, 0.95, 0.99)).plan.model == "middle"


def test_what_is_not_known_is_worth_nothing_that_is_known() -> None:
    half = run(policy(**UTILITY), measured(0.9, 0.95, None))
    assert (half.plan.model, half.degraded) == ("weak", "")
    assert reasons(half)["strong"] == "its p_success is not known, and so not what it is worth"
    blind = run(policy(**UTILITY))
    assert (blind.plan.model, blind.degraded) == ("strong", "probe_unavailable")


P = st.floats(0, 1)
LOADS = st.builds(
    Load,
    queue=st.integers(0, 50),
    running=st.integers(0, 50),
    slots=st.sampled_from([None, 1, 8]),
    tokens_per_s=st.sampled_from([None, 20.0, 200.0]),
    prefill_tokens_per_s=st.sampled_from([None, 1000.0]),
    ttft_ms_p50=st.sampled_from([None, 100.0, 900.0]),
    ttft_ms_p95=st.sampled_from([None, 400.0, 4000.0]),
)
STATES = st.builds(State, load=st.dictionaries(st.sampled_from(NAMES), LOADS))


@given(st.tuples(P, P, P), STATES, st.sampled_from(["$0", "$0.001"]))
def test_nothing_that_was_weighed_is_worth_more_than_the_choice(
    p: tuple[float, float, float], state: State, second: str
) -> None:
    of = policy(
        objective="utility", worth=f"{{point: $0.0002, second: {second}}}" if second != "$0" else "{point: $0.0002}"
    )
    decision = run(of, measured(*p), state)
    worths = {candidate.model: candidate.utility_nanousd for candidate in decision.candidates}
    chosen = worths[decision.plan.model]
    assert chosen is not None
    assert chosen == max(worth for worth in worths.values() if worth is not None)


@given(st.tuples(P, P, P), st.integers(0, 10**9))
def test_the_more_a_point_is_worth_the_better_the_choice(p: tuple[float, float, float], point: int) -> None:
    of = policy(**UTILITY)
    route = of.routes[0]
    assert route.worth is not None

    def quality(at: int) -> float:
        worth = dataclasses.replace(route.worth, point=at)  # type: ignore[type-var]
        priced = dataclasses.replace(of, routes=(dataclasses.replace(route, worth=worth),))
        chosen = run(priced, measured(*p)).plan.model
        return p[NAMES.index(chosen)]

    assert quality(point) <= quality(2 * point + 1)


def test_a_second_costs_what_it_is_worth_and_an_unknown_time_counts_as_the_mean() -> None:
    route = policy(objective="utility", worth="{point: $0.0002, second: $0.001}").routes[0]
    state = State(
        load={"weak": Load(tokens_per_s=40.0, ttft_ms_p50=0.0), "strong": Load(tokens_per_s=80.0, ttft_ms_p50=0.0)}
    )
    models = policy().models
    options = [Option(models[name], at, ASKED, measured(0.5, 0.5, 0.5), state) for at, name in enumerate(NAMES)]
    weigh(route, options)
    assert [option.expected_ms for option in options] == [10_000, None, 5_000]
    assert [option.utility for option in options] == [
        10_000_000 - 900_000 - 10_000_000,
        10_000_000 - 2_700_000 - 7_500_000,
        10_000_000 - 9_000_000 - 5_000_000,
    ]


# Time and placement

FAST, SLOW = Load(tokens_per_s=100.0, ttft_ms_p50=200.0), Load(tokens_per_s=20.0, ttft_ms_p50=200.0)


def test_the_cheapest_that_is_in_time_else_the_fastest() -> None:
    slo = policy(subject_to='{latency: "<= 5s"}', otherwise="fastest")
    assert run(slo, state=State(load={"weak": SLOW, "middle": FAST, "strong": FAST})).plan.model == "middle"
    assert run(slo, state=State(load={"weak": FAST, "middle": FAST})).plan.model == "weak"
    late = run(
        slo, state=State(load={"weak": SLOW, "middle": SLOW, "strong": Load(tokens_per_s=50.0, ttft_ms_p50=1.0)})
    )
    assert (late.plan.model, late.rule) == ("strong", "no candidate meets latency <= 5s; otherwise fastest")
    assert reasons(late)["weak"] == "time to the end 20200ms above 5s"
    unknown = run(slo)
    assert unknown.plan.model == "weak", "what was never measured is taken to be in time"


def test_a_slow_first_token_rules_out() -> None:
    first = policy(subject_to='{ttft_p95: "<= 1.5s"}')
    state = State(load={"weak": Load(ttft_ms_p50=300.0, ttft_ms_p95=1600.0)})
    decision = run(first, state=state)
    assert (decision.plan.model, reasons(decision)["weak"]) == ("middle", "time to the first token 1600ms above 1500ms")


@given(st.dictionaries(st.sampled_from(NAMES), LOADS, min_size=1))
def test_nothing_is_faster_than_the_fastest_but_what_was_never_measured(load: Mapping[str, Load]) -> None:
    decision = run(policy(objective="fastest"), state=State(load=load))
    times = {candidate.model: candidate.expected_ms for candidate in decision.candidates}
    chosen = times[decision.plan.model]
    known = [ms for ms in times.values() if ms is not None]
    assert chosen == (min(known) if len(known) == len(times) else None)


@given(LOADS, st.integers(0, 10_000), st.integers(1, 2000))
def test_more_queue_never_makes_an_answer_sooner(load: Load, new: int, answer: int) -> None:
    longer = replace(load, queue=load.queue + 1)
    assert wait_ms(longer, answer) >= wait_ms(load, answer)
    before, after = latency_ms(load, new, answer), latency_ms(longer, new, answer)
    assert (before is None) == (after is None)
    assert before is None or after is None or after >= before
    first, slowest = ttft_ms_p95(load, new, answer), load.ttft_ms_p95
    assert slowest is None or (first is not None and first >= slowest)


def test_a_full_target_makes_wait_for_as_many_answers_as_are_ahead() -> None:
    busy = Load(queue=3, running=4, slots=4, tokens_per_s=100.0, prefill_tokens_per_s=1000.0)
    assert wait_ms(busy, 200) == 4 / 4 * 2000
    assert latency_ms(busy, 500, 200) == 2000 + 500 + 2000
    assert wait_ms(replace(busy, queue=0, running=3), 200) == 0


# Thresholds

TWO = {"candidates": "[weak, strong]", "objective": "threshold", "threshold": "0.1"}


def test_the_strong_answers_where_it_is_better_by_more_than_the_threshold() -> None:
    close = run(policy(**TWO), measured(0.8, None, 0.9))
    assert (close.plan.model, close.rule) == ("weak", "threshold 0.1")
    assert reasons(close)["strong"] == "better than weak by 0.1, more than 0.1 asked"
    far = run(policy(**TWO), measured(0.7, None, 0.9))
    assert (far.plan.model, reasons(far)["weak"]) == ("strong", "p_success 0.7 is 0.2 below strong, 0.1 allowed")
    blind = run(policy(**TWO), measured(0.7, None, None))
    assert (blind.plan.model, blind.degraded) == ("strong", "probe_unavailable")
    assert run(policy(**TWO), state=State({"strong": "down"})).plan.model == "weak"


@given(P, P, P)
def test_a_lower_threshold_never_takes_a_query_from_the_strong(weak: float, strong: float, threshold: float) -> None:
    of = policy(**TWO)

    def model(at: float) -> str:
        route = dataclasses.replace(of.routes[0], threshold=at)
        return run(dataclasses.replace(of, routes=(route,)), measured(weak, None, strong)).plan.model

    assert not (model(threshold) == "strong" and model(threshold / 2) == "weak")


# Hints

HINTS = st.builds(
    Hints,
    max_cost_nanousd=st.sampled_from([None, 0, 1_000_000, 5_000_000]),
    min_p_success=st.sampled_from([None, 0.3, 0.9]),
    models=st.none() | st.frozensets(st.sampled_from([*NAMES, "other"])),
)


@given(HINTS, st.tuples(P, P, P), st.sampled_from(["cheapest", "best"]), st.booleans())
def test_hints_only_narrow(hints: Hints, p: tuple[float, float, float], objective: str, reserve: bool) -> None:
    of = policy(
        objective=objective,
        otherwise="cheapest",
        subject_to='{cost: "<= $0.1"}',
        **({"on_failure": "[middle]"} if reserve else {}),
    )
    decision = attempt(of, measured(*p), replace(ASKED, hints=hints))
    if isinstance(decision, NoCandidate):
        assert decision.kind == "constraints"
        return
    by_name = {candidate.model: candidate for candidate in decision.candidates}
    for name in {decision.plan.model, *decision.fallbacks}:
        cost = by_name[name].expected_cost_nanousd
        assert cost is not None
        assert hints.max_cost_nanousd is None or cost <= hints.max_cost_nanousd
        assert hints.models is None or name in hints.models
    allowed = [
        at for at, name in enumerate(NAMES) if by_name[name].rejected == "" or "caller" not in by_name[name].rejected
    ]
    if hints.min_p_success is not None and any(p[at] >= hints.min_p_success for at in allowed):
        assert p[NAMES.index(decision.plan.model)] >= hints.min_p_success


def test_a_hint_is_told_of_in_words() -> None:
    asked = replace(ASKED, hints=Hints(min_p_success=0.9, models=frozenset({"weak", "strong"})))
    decision = run(policy(), measured(0.5, 0.95, 0.97), query=asked)
    assert decision.plan.model == "strong"
    assert decision.rule == "cheapest and p_success >= 0.9, asked by the caller"
    assert reasons(decision) == {
        "weak": "p_success 0.5 below 0.9",
        "middle": "not among the models that the caller allows",
        "strong": "",
    }
    with pytest.raises(NoCandidate, match="at most \\$0 asked by the caller") as refused:
        run(policy(), query=replace(ASKED, hints=Hints(max_cost_nanousd=0)))
    assert refused.value.kind == "constraints"
    named = replace(ASKED, model="strong", hints=Hints(max_cost_nanousd=1))
    with pytest.raises(NoCandidate, match=r"expected cost \$0.009, at most"):
        run(policy(), query=named)


# The file

PROBLEMS = [
    ({"objective": "utility"}, "objective", "not said what quality is worth"),
    ({"worth": "{point: $0.1}"}, "worth", "only the objective `utility`"),
    ({"objective": "utility", "worth": "{point: 0.1}"}, "worth.point", "an amount without its unit"),
    ({"objective": "threshold", "candidates": "[weak, strong]"}, "objective", "which threshold"),
    ({"objective": "threshold", "threshold": "0.1"}, "objective", "tells two candidates apart"),
    ({"threshold": "0.1"}, "threshold", "only the objective `threshold`"),
    ({**TWO, "threshold": "1.5"}, "threshold", "too large"),
    ({"candidates": "[weak]", "explore": "{share: 5%}"}, "explore", "nothing to explore"),
    ({"explore": "{share: 5%, temperature: 0}"}, "explore.temperature", "too small"),
    ({"subject_to": '{latency: "5s"}'}, "subject_to.latency", "not a bound"),
]


@pytest.mark.parametrize(("lines", "field", "message"), PROBLEMS)
def test_what_does_not_fit_together_is_a_load_error(lines: dict[str, str], field: str, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        policy(**lines)
    found = [(problem.field, problem.message) for problem in refused.value.problems]
    assert any(where.endswith(field) and message in words for where, words in found), found


def test_a_head_is_missing() -> None:
    text = HEAD.replace("weak: weak, ", "") + "  - {name: auto, when: {model: auto}, candidates: [weak, strong], "
    with pytest.raises(PolicyError, match="no probe head for weak"):
        parse(text + "objective: utility, worth: {point: $0.1}}\n")
    learned = parse(text + "objective: utility, worth: {point: $0.1}, explore: {share: 5%}}\n")
    assert learned.routes[0].explore is not None, "a bandit learns what no head says"


@given(st.tuples(P, P, P), STATES)
def test_every_loser_is_told_why(p: tuple[float, float, float], state: State) -> None:
    for lines in (UTILITY, {"objective": "fastest"}, {"subject_to": '{latency: "<= 5s", p_success: ">= 0.5"}'}):
        decision = run(policy(**lines), measured(*p), state)
        losers = [candidate for candidate in decision.candidates if candidate.model != decision.plan.model]
        assert all(candidate.rejected for candidate in losers)
        assert len(to_lines(decision)) >= 4
