"""Cascades, efforts and conversations that stay: what they are expected to cost and to bring."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from probes.types import Estimate
from routers import cascade, effort
from routers.affinity import held, switch_nanousd
from routers.aims import Affinity, Thinking
from routers.decide import decide
from routers.explain import to_lines
from routers.load import parse
from routers.policy import Policy
from routers.types import Accept, Cascade, Decision, Effort, Hints, Load, Plan, Query, Signals, Single, State
from tests.routers.test_aims import ASKED, HEAD, NAMES, measured

ACCEPT = Accept((("mean_logprob", 4.0),), 2.0, 0.8, keeps_right=0.9, keeps_wrong=0.2)
P = st.floats(0, 1)


def with_plans(*candidates: Plan, **route: object) -> Policy:
    base = parse(HEAD + "  - {name: auto, when: {model: auto}, candidates: [weak, middle, strong]}\n")
    plans = {plan.name: plan for plan in candidates if plan != Single(plan.model)}
    changed = dataclasses.replace(
        base.routes[0],
        candidates=tuple(plan.name for plan in candidates),
        plans=plans,
        **route,  # type: ignore[arg-type]
    )
    return dataclasses.replace(base, routes=(changed,))


def run(of: Policy, signals: Signals = Signals(), state: State = State(), query: Query = ASKED) -> Decision:
    return decide(query, signals, of, state, 0)


# Cascades

CASCADE = Cascade((Single("weak"), Single("strong")), ACCEPT)


def test_a_conversation_that_is_bound_to_a_provider_is_offered_no_cascade_that_leaves_it() -> None:
    of = with_plans(CASCADE, Single("weak"), objective="best")
    signals = Signals({"weak": Estimate(0.6, "a@1/w"), "strong": Estimate(0.95, "a@1/s")})
    elsewhere = dataclasses.replace(of.models["strong"], provider="elsewhere")
    of = dataclasses.replace(of, models={**of.models, "strong": elsewhere})
    assert run(of, signals).plan.kind == "cascade"
    decision = run(of, signals, State(bound_to=of.models["weak"].provider))
    assert (decision.plan.kind, decision.plan.model) == ("single", "weak")
    assert "blocks that only" in decision.candidates[0].rejected


def test_what_a_caller_would_spend_at_most_holds_for_all_stages_together() -> None:
    of = with_plans(CASCADE, Single("weak"))
    total = 900_000 + 9_000_000
    for most, offered in ((total, True), (total - 1, False)):
        asked = replace(ASKED, hints=Hints(max_cost_nanousd=most))
        rejected = run(of, query=asked).candidates[0].rejected
        assert ("asked by the caller" in rejected) is not offered


def test_a_cascade_costs_the_weak_one_and_now_and_then_the_strong_one() -> None:
    of = with_plans(Single("weak"), CASCADE, Single("strong"))
    signals = Signals({"weak": Estimate(0.6, "a@1/w", 0.4, 0.7), "strong": Estimate(0.95, "a@1/s", 0.9, 1.0)})
    decision = run(of, signals, State(load={name: Load(tokens_per_s=400.0, ttft_ms_p50=0.0) for name in NAMES}))
    found = {candidate.model: candidate for candidate in decision.candidates}
    escalates = 1 - (0.6 * 0.9 + 0.4 * 0.2)
    told = found["weak>strong"]
    assert told.expected_cost_nanousd == round(900_000 + escalates * 9_000_000)
    assert told.worst_cost_nanousd == found["weak"].worst_cost_nanousd + found["strong"].worst_cost_nanousd  # type: ignore[operator]
    assert told.p_success == pytest.approx(0.95 - 0.2 * (0.95 - 0.6)), "a fifth of what only strong solves is lost"
    assert told.expected_ms == round(1000 + escalates * 1000)
    assert told.p_low is not None
    assert told.p_high is not None
    assert told.p_success is not None
    assert told.p_low < told.p_success < told.p_high


def test_a_cascade_is_chosen_where_it_is_the_cheapest_that_is_good_enough() -> None:
    from routers.policy import Constraints

    of = with_plans(Single("weak"), CASCADE, Single("strong"), constraints=Constraints(p_success=0.8))
    decision = run(of, measured(0.6, None, 0.95))
    assert decision.plan == CASCADE
    assert decision.plan.model == "weak"
    assert to_lines(decision)[0].startswith("weak>strong, by route auto")
    assert {c.model: c.rejected for c in decision.candidates}["strong"] == "costs $0.009, weak>strong $0.00432"
    assert run(of, measured(0.9, None, 0.95)).plan == Single("weak")
    assert run(of, measured(0.6, None, 0.95), State({"strong": "down"})).plan == Single("weak"), "one stage cannot run"
    assert run(of, measured(0.6, None, 0.95), query=replace(ASKED, choices=2)).plan == Single("strong")


def test_a_cascade_whose_chances_are_not_known_is_expected_to_escalate() -> None:
    of = with_plans(CASCADE, Single("strong"))
    told = {c.model: c for c in run(of).candidates}
    assert told["weak>strong"].expected_cost_nanousd == 900_000 + 9_000_000
    assert told["weak>strong"].p_success is None


@given(P, P, P, P, P)
def test_a_better_weak_answer_never_makes_a_cascade_worse(
    p: float, q: float, strong: float, right: float, wrong: float
) -> None:
    keeps = max(right, wrong), min(right, wrong)
    low, high = sorted((p, q))
    assert cascade.p_success(low, strong, keeps) <= cascade.p_success(high, strong, keeps) + 1e-12
    assert cascade.p_accept(low, keeps) <= cascade.p_accept(high, keeps) + 1e-12
    assert 0 <= cascade.p_success(p, strong, keeps) <= max(p, strong) + 1e-12
    if_right, if_wrong = cascade.after(p, strong)
    assert p * if_right + (1 - p) * if_wrong == pytest.approx(strong), "it splits the same chance"


UNMEASURED = Accept(agree=2, keeps_right=None, keeps_wrong=None)
AGREED = Cascade((Single("weak"), Single("middle", beside=True), Single("strong")), UNMEASURED)


def test_what_two_agree_on_saves_the_third() -> None:
    of = with_plans(AGREED, Single("strong"))
    signals, state = measured(0.8, 0.9, 0.95), State(load={n: Load(tokens_per_s=400.0, ttft_ms_p50=0.0) for n in NAMES})
    told = {c.model: c for c in run(of, signals, state).candidates}["weak&middle>strong"]
    escalates = 1 - (0.8 * 0.9 + 0.2 * 0.1)
    assert told.expected_cost_nanousd == round(900_000 + 2_700_000 + escalates * 9_000_000)
    assert told.p_success == pytest.approx(0.95 - 0.1 * (0.95 - 0.8))
    assert told.expected_ms == round(1000 + escalates * 1000), "both are asked at the same time"
    measured_rule = replace(AGREED, accept=Accept(agree=2, keeps_right=0.98, keeps_wrong=0.3))
    told = {c.model: c for c in run(with_plans(measured_rule, Single("strong")), signals).candidates}[AGREED.name]
    escalates = 1 - (0.8 * 0.98 + 0.2 * 0.3)
    assert told.expected_cost_nanousd == round(900_000 + 2_700_000 + escalates * 9_000_000)
    told = {c.model: c for c in run(of, measured(0.8, None, 0.95)).candidates}[AGREED.name]
    assert (told.p_success, told.expected_cost_nanousd) == (None, 900_000 + 2_700_000 + 9_000_000)


def test_who_comes_after_the_first_that_may_agree_is_not_counted_on() -> None:
    four = Cascade((Single("weak"), Single("middle"), Single("strong"), Single("weak", "high")), UNMEASURED)
    of = with_plans(four, Single("strong"))
    told = {c.model: c for c in run(of, measured(0.8, 0.9, 0.95)).candidates}[four.name]
    assert told.p_success is None, "nothing is known of weak+high"
    escalates = 1 - (0.8 * 0.9 + 0.2 * 0.1)
    assert told.expected_cost_nanousd == round(900_000 + 2_700_000 + escalates * (9_000_000 + 900_000))


def test_three_stages_fold_from_the_last() -> None:
    three = Cascade((Single("weak"), Single("middle"), Single("strong")), ACCEPT)
    told = {c.model: c for c in run(with_plans(three, Single("strong")), measured(0.5, 0.7, 0.9)).candidates}
    on_weak, on_middle = 1 - (0.45 + 0.1), 1 - (0.63 + 0.06)
    assert told[three.name].expected_cost_nanousd == round(900_000 + on_weak * (2_700_000 + on_middle * 9_000_000))
    after_weak = 0.9 - 0.2 * (0.9 - 0.7)
    assert told[three.name].p_success == pytest.approx(after_weak - 0.2 * (after_weak - 0.5))


def test_an_answer_is_accepted_by_its_log_probabilities() -> None:
    assert cascade.p_correct(ACCEPT, [-0.1, -0.3]) == pytest.approx(1 / (1 + math.exp(-(2 - 0.8))))
    assert not cascade.accepts(ACCEPT, [-0.1, -0.3])
    assert cascade.accepts(ACCEPT, [-0.01, -0.02])
    assert not cascade.accepts(ACCEPT, []), "what cannot be judged is not good enough"
    assert not cascade.accepts(ACCEPT, [-0.1, float("-inf")])
    assert not cascade.accepts(ACCEPT, [float("nan")])
    both = replace(ACCEPT, weights=(("min_logprob", 1.0), ("log_tokens", -2.0)), bias=0.0)
    assert cascade.p_correct(both, [-0.5, -1.0]) == pytest.approx(1 / (1 + math.exp(1 + 2 * math.log(2))))
    assert cascade.p_correct(both, [-5000.0]) == 0.0


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=50), st.floats(0, 1))
def test_less_likely_tokens_never_turn_a_refusal_into_acceptance(logprobs: list[float], drop: float) -> None:
    worse = [value - drop for value in logprobs]
    if cascade.accepts(ACCEPT, worse):
        assert cascade.accepts(ACCEPT, logprobs)


# Efforts

THINKING = Thinking("reasoning_effort", 1000, 8000)


def thinking(of: Policy, *names: str) -> Policy:
    models = {
        name: dataclasses.replace(m, thinking=THINKING if name in names else None) for name, m in of.models.items()
    }
    return dataclasses.replace(of, models=models)


def told(pays: float | None = None, difficulty: float | None = None) -> Signals:
    return Signals(
        needs_reasoning=None if pays is None else Estimate(pays, "p"),
        difficulty=None if difficulty is None else Estimate(difficulty, "p"),
    )


@pytest.mark.parametrize(
    ("signals", "effort", "tokens"),
    [
        (told(0.2, 0.9), "none", 0),
        (told(0.9, 0.1), "low", 1000),
        (told(0.9, 0.5), "high", 8000),
        (told(0.9, 0.9), "high", 4000),
        (told(None, 0.5), "high", 8000),
        (told(0.9), "high", 8000),
        (told(), None, None),
    ],
)
def test_the_signals_choose_the_effort(signals: Signals, effort: Effort | None, tokens: int | None) -> None:
    of = thinking(with_plans(Single("weak"), effort="auto"), "weak")
    assert run(of, signals).plan == Single("weak", effort, tokens)
    assert run(thinking(of), signals).plan == Single("weak"), "a model that cannot be told is told nothing"
    stated = replace(ASKED, reasoning="medium")
    assert run(of, signals, query=stated).plan == Single("weak"), "the caller's own word stands"


EFFORTS = st.sampled_from(["none", "low", "high"])


@given(EFFORTS, st.none() | P, st.none() | P, st.sampled_from(["auto", "none", "low", "high", None]))
def test_a_hint_only_lowers_the_effort(
    most: Effort, pays: float | None, difficulty: float | None, route: Effort | None
) -> None:
    of = thinking(with_plans(Single("weak"), effort=route), "weak")
    free = run(of, told(pays, difficulty)).plan
    hinted = run(of, told(pays, difficulty), query=replace(ASKED, hints=Hints(effort=most))).plan
    assert isinstance(free, Single)
    assert isinstance(hinted, Single)
    assert hinted.effort is not None
    assert effort.rank(hinted.effort) <= effort.rank(most)
    if free.effort is not None:
        assert effort.rank(hinted.effort) <= effort.rank(free.effort)
        assert hinted.max_thinking_tokens is not None
        assert free.max_thinking_tokens is not None
        assert hinted.max_thinking_tokens <= free.max_thinking_tokens


def test_efforts_are_candidates_with_heads_of_their_own() -> None:
    from routers.policy import Constraints

    of = thinking(
        with_plans(
            Single("weak", "none"), Single("weak", "high"), Single("strong"), constraints=Constraints(p_success=0.8)
        ),
        "weak",
    )
    signals = Signals(
        {"weak+none": Estimate(0.5, "p"), "weak+high": Estimate(0.85, "p"), "strong": Estimate(0.9, "p")},
        out_tokens={"weak+none": Estimate(100, "p"), "weak+high": Estimate(2000, "p")},
    )
    decision = run(of, signals)
    assert decision.plan == Single("weak", "high", 8000)
    assert {c.model: c.expected_cost_nanousd for c in decision.candidates} == {
        "weak+none": 100_000 + 200_000,
        "weak+high": 100_000 + 4_000_000,
        "strong": 9_000_000,
    }
    low = run(of, signals, query=replace(ASKED, hints=Hints(effort="low")))
    assert low.plan == Single("strong")
    assert {c.model: c.rejected for c in low.candidates}["weak+high"] == "effort high, at most low asked by the caller"


# Staying

AFFINITY = Affinity(ttl_ms=300_000, comes_back=0.5, release=0.3)


def test_what_is_cached_is_cheap_and_leaving_it_has_its_price() -> None:
    text = HEAD.replace("input: $10/Mtok", "input: $10/Mtok, cached_input: $1/Mtok")
    of = parse(text + "  - {name: auto, when: {model: auto}, candidates: [middle, strong]}\n")
    staying = dataclasses.replace(of, routes=(dataclasses.replace(of.routes[0], affinity=AFFINITY),))
    asked = replace(ASKED, input_tokens_estimate=5000, input_tokens_max=6000, max_output_tokens=100)
    signals, state = Signals(cached_tokens={"strong": 4800}), State(session_model="strong")
    decision = run(staying, signals, state, asked)
    found = {candidate.model: candidate for candidate in decision.candidates}
    assert found["strong"].expected_cost_nanousd == 200 * 10_000 + 4800 * 1_000 + 100 * 20_000
    assert found["strong"].switch_nanousd == 0
    assert found["middle"].expected_cost_nanousd == 5000 * 3_000 + 100 * 6_000
    assert found["middle"].switch_nanousd == round(0.5 * 4800 * 9_000)
    assert decision.plan.model == "strong"
    assert found["middle"].rejected == "costs $0.0372 with $0.0216 to leave the conversation's model, strong $0.0088"
    assert run(staying, Signals(), state, asked).plan.model == "middle", "dropped: nothing is lost by leaving"
    assert run(of, signals, state, asked).plan.model == "strong", "the bill alone"


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1))
def test_the_switch_is_worth_what_is_cached_and_never_negative(few: int, more: int, back: float) -> None:
    model = parse(
        HEAD.replace("input: $10/Mtok", "input: $10/Mtok, cached_input: $1/Mtok") + "  - {name: a, use: [weak]}\n"
    ).models["strong"]
    affinity = dataclasses.replace(AFFINITY, comes_back=back)
    few, more = sorted((few, more))
    assert 0 <= switch_nanousd(affinity, model, few) <= switch_nanousd(affinity, model, more) <= more * 9_000
    assert switch_nanousd(affinity, dataclasses.replace(model, price=None), more) == 0


@given(P, P, P)
def test_a_fall_is_believed_at_once_and_a_rise_in_part(before: float, now: float, release: float) -> None:
    value = held(measured(now, None, None), {"weak": before}, release).p_success["weak"].value
    assert value <= now
    assert value == now if now <= before else before <= value + 1e-12


def test_a_conversation_attacks_fast_and_releases_slowly() -> None:
    from routers.policy import Constraints

    of = with_plans(Single("weak"), Single("strong"), constraints=Constraints(p_success=0.8), affinity=AFFINITY)
    easy, hard = measured(0.95, None, 0.99), measured(0.2, None, 0.9)
    before: dict[str, float] = {}
    served = []
    for signals in (easy, hard, *[easy] * 6):
        decision = run(of, signals, State(session_p=before))
        served.append(decision.plan.model)
        before = {c.model: c.p_success for c in decision.candidates if c.p_success is not None}
    assert served == ["weak", "strong", "strong", "strong", "strong", "strong", "weak", "weak"]
