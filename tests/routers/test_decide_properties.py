"""Decisions of any policy, query and state: sound, and never dearer for a tighter bound."""

import contextlib
import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from probes.types import Estimate
from routers.decide import decide
from routers.errors import NoCandidate
from routers.explain import from_dict, to_dict, to_lines
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State
from tests.routers.deciding import policy

PROBABILITY = st.floats(min_value=0, max_value=1)
NAMES = ("local", "weak", "strong", "other")
ASKED = st.builds(
    Query,
    model=st.sampled_from(["auto", *NAMES]),
    tenant=st.just("t"),
    input_tokens_estimate=st.integers(0, 120_000),
    max_output_tokens=st.none() | st.integers(1, 4000),
    needs_tools=st.booleans(),
    needs_logprobs=st.booleans(),
    choices=st.integers(1, 3),
)
SIGNALS = st.builds(
    Signals,
    p_success=st.dictionaries(st.sampled_from(NAMES), PROBABILITY.map(lambda p: Estimate(p, "a@1/x", None, None))),
    input_tokens=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 20_000), max_size=2),
    probe=st.sampled_from(["ok", "unavailable", "not_asked"]),
)
STATES = st.builds(
    State,
    unavailable=st.dictionaries(st.sampled_from(NAMES), st.just("down"), max_size=2),
    budget_remaining_nanousd=st.none() | st.integers(-1, 10**8),
)
CAPS = [0, 10_000, 500_000, 900_000, 5_000_000, 10**9]


def build(
    objective: str,
    p: float | None,
    gap: float | None,
    cap: int | None,
    otherwise: str,
    reserve: bool,
    use: bool = False,
) -> Policy:
    if use:
        return policy(use="[weak, local, strong]", **({"on_failure": "[other, strong, local]"} if reserve else {}))
    bounds = []
    if p is not None:
        bounds.append(f'p_success: ">= {p}"')
    if gap is not None:
        bounds.append(f'p_success_gap: "<= {gap}"')
    if cap is not None:
        bounds.append(f'cost: "<= ${cap / 10**9:.9f}"')
    options = {"subject_to": "{" + ", ".join(bounds) + "}", "otherwise": otherwise} if bounds else {}
    if reserve:
        options["on_failure"] = "[other, strong, local]"
    return policy(objective=objective, **options)


POLICIES = st.builds(
    build,
    objective=st.sampled_from(["cheapest", "best"]),
    p=st.sampled_from([None, 0.5, 0.9]),
    gap=st.sampled_from([None, 0.1]),
    cap=st.sampled_from([None, *CAPS]),
    otherwise=st.sampled_from(["best", "cheapest", "refuse"]),
    reserve=st.booleans(),
    use=st.booleans(),
)


def attempt(policy: Policy, query: Query, signals: Signals, state: State) -> Decision | None:
    with contextlib.suppress(NoCandidate):
        return decide(query, signals, policy, state, 7)
    return None


@given(POLICIES, ASKED, SIGNALS, STATES)
def test_every_decision_is_sound(policy: Policy, query: Query, signals: Signals, state: State) -> None:
    decision = attempt(policy, query, signals, state)
    if decision is None:
        return
    assert decision == attempt(policy, query, signals, state), "the same inputs, the same decision"
    assert from_dict(json.loads(json.dumps(to_dict(decision)))) == decision
    assert from_dict(json.loads(msgspec.json.encode(decision))) == decision, "as the gateway keeps it in the ledger"
    assert to_lines(decision)[0].startswith(decision.plan.model)
    by_name = {candidate.model: candidate for candidate in decision.candidates}
    assert len(by_name) == len(decision.candidates)
    running = {decision.plan.model, *decision.fallbacks}.union(*decision.on_cause.values())
    assert decision.plan.model not in decision.fallbacks
    for name, candidate in by_name.items():
        assert (candidate.rejected == "") == (name in running)
        assert candidate.expected_cost_nanousd is not None
        assert candidate.worst_cost_nanousd is not None
        assert 0 <= candidate.expected_cost_nanousd <= candidate.worst_cost_nanousd
    for name in running:
        assert name not in state.unavailable
        if state.budget_remaining_nanousd is not None:
            worst = by_name[name].worst_cost_nanousd
            assert worst is not None
            assert worst <= max(state.budget_remaining_nanousd, 0)
    if query.model != "auto":
        assert decision.plan.model == query.model
        return
    chosen, bounds = by_name[decision.plan.model], policy.routes[0].constraints
    asked_for_less = "otherwise" in decision.rule or "no candidate" in decision.rule
    if not asked_for_less:
        if bounds.p_success is not None:
            assert chosen.p_success is not None
            assert chosen.p_success >= bounds.p_success
        if bounds.cost_nanousd is not None:
            assert chosen.expected_cost_nanousd is not None
            assert chosen.expected_cost_nanousd <= bounds.cost_nanousd


@given(
    st.sampled_from(["cheapest", "best"]),
    st.sampled_from([None, 0.5, 0.9]),
    st.sampled_from([None, 0.1]),
    st.sampled_from(["best", "cheapest"]),
    st.sampled_from(CAPS),
    st.sampled_from(CAPS),
    ASKED,
    SIGNALS,
    STATES,
)
def test_a_tighter_bound_on_cost_never_costs_more(
    objective: str,
    p: float | None,
    gap: float | None,
    otherwise: str,
    one: int,
    two: int,
    query: Query,
    signals: Signals,
    state: State,
) -> None:
    costs = []
    for cap in sorted((one, two)):
        decision = attempt(build(objective, p, gap, cap, otherwise, False), query, signals, state)
        if decision is None:
            return
        cost = next(c.expected_cost_nanousd for c in decision.candidates if c.model == decision.plan.model)
        assert cost is not None
        costs.append(cost)
    assert costs[0] <= costs[1]
