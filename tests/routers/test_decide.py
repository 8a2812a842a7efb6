"""Decisions: the right model, for the reason the policy states, and never by chance."""

import contextlib
import dataclasses
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.types import Estimate
from routers.cost import costs_nanousd, least_input_tokens
from routers.decide import decide
from routers.errors import NoCandidate
from routers.explain import from_dict, to_dict, to_lines
from routers.load import parse
from routers.policy import Model, Policy, Price
from routers.types import Accept, Cascade, Decision, Plan, Query, Signals, Single, Speculate, State, Vote
from routers.units import format_money

HEAD = """\
version: 1
providers:
  home:   {engine: embedded}
  remote: {base_url: https://h/v1}
models:
  local:  {provider: home, model: base, context: 1024}
  weak:   {provider: remote, model: w, context: 8000, max_output: 2000, price: {input: $1/Mtok, output: $2/Mtok}}
  strong: {provider: remote, model: s, context: 100000, price: {input: $10/Mtok, output: $20/Mtok}}
  other:  {provider: remote, model: o, logprobs: false, price: {input: $5/Mtok, cache_write: $6/Mtok, output: $5/Mtok}}
signals:
  difficulty: {probe: default, heads: {local: local, weak: weak, strong: strong}}
routes:
"""


def policy(**route: str) -> Policy:
    """A policy with one route for `auto`, of the given lines."""
    lines = {"when": "{model: auto}", "candidates": "[local, weak, strong]"} | route
    if "use" in route:
        del lines["candidates"]
    return parse(HEAD + "  - name: auto\n" + "".join(f"    {key}: {value}\n" for key, value in lines.items()))


def routes(text: str) -> Policy:
    return parse(HEAD + text)


def query(model: str = "auto", **options: object) -> Query:
    base = Query(model, "tenant", input_tokens_estimate=100, max_output_tokens=None, input_tokens_max=100)
    return msgspec.structs.replace(base, **options)


def measured(**p: float) -> Signals:
    return Signals({name: Estimate(value, f"a@1/{name}", value / 2, 1.0) for name, value in p.items()}, {}, "ok")


def run(
    policy: Policy, query: Query = query(), signals: Signals = Signals(), state: State = State(), seed: int = 0
) -> Decision:
    return decide(query, signals, policy, state, seed)


def reasons(decision: Decision) -> dict[str, str]:
    return {candidate.model: candidate.rejected for candidate in decision.candidates}


P90 = '{p_success: ">= 0.90"}'
EASY = measured(local=0.95, weak=0.97, strong=0.99)
MIDDLING = measured(local=0.5, weak=0.92, strong=0.98)
HARD = measured(local=0.1, weak=0.3, strong=0.6)


@pytest.mark.parametrize(("signals", "model"), [(EASY, "local"), (MIDDLING, "weak"), (HARD, "strong")])
def test_cheapest_that_is_good_enough(signals: Signals, model: str) -> None:
    assert run(policy(subject_to=P90), signals=signals).plan.model == model


def test_the_reasons_are_told() -> None:
    decision = run(policy(subject_to=P90), signals=MIDDLING)
    assert decision.rule == "cheapest with p_success >= 0.9"
    assert (decision.route, decision.degraded, decision.probe_version) == ("auto", "", "a@1")
    assert reasons(decision) == {
        "local": "p_success 0.5 below 0.9",
        "weak": "",
        "strong": "costs $0.009, weak $0.0009",
    }


def test_otherwise_best() -> None:
    decision = run(policy(subject_to=P90), signals=HARD)
    assert decision.rule == "no candidate meets p_success >= 0.9; otherwise best (highest p_success)"
    assert decision.degraded == ""


def test_otherwise_cheapest() -> None:
    decision = run(policy(subject_to=P90, otherwise="cheapest"), signals=HARD)
    assert (decision.plan.model, decision.rule) == ("local", "no candidate meets p_success >= 0.9; otherwise cheapest")


def test_otherwise_refuse() -> None:
    with pytest.raises(
        NoCandidate, match=r"no candidate meets p_success >= 0\.9; local: p_success 0\.1 below"
    ) as caught:
        run(policy(subject_to=P90, otherwise="refuse"), signals=HARD)
    assert caught.value.kind == "constraints"
    assert [model for model, _ in caught.value.reasons] == ["local", "weak", "strong"]


def test_without_the_probe_the_last_listed_is_trusted() -> None:
    decision = run(policy(subject_to=P90), signals=Signals(probe="unavailable"))
    assert (decision.plan.model, decision.degraded) == ("strong", "probe_unavailable")
    assert "last listed, as p_success is not known" in decision.rule
    assert reasons(decision)["local"] == "p_success not known, 0.9 asked"


def test_a_known_candidate_is_enough() -> None:
    decision = run(policy(subject_to=P90), signals=measured(local=0.95))
    assert (decision.plan.model, decision.degraded) == ("local", "")


def test_best_takes_the_highest_and_breaks_ties_by_cost() -> None:
    best = policy(objective="best")
    assert run(best, signals=MIDDLING).plan.model == "strong"
    tied = run(best, signals=measured(local=0.5, weak=0.9, strong=0.9))
    assert tied.plan.model == "weak"
    assert reasons(tied) == {
        "local": "p_success 0.5 below 0.9 of weak",
        "weak": "",
        "strong": "costs $0.009, weak $0.0009",
    }
    guessed = run(best)
    assert (guessed.plan.model, guessed.degraded) == ("strong", "probe_unavailable")


def test_ties_go_to_the_first_listed() -> None:
    both = policy(candidates="[weak, strong]", subject_to='{cost: "<= $1"}')
    same = dataclasses.replace(both.models["strong"], price=both.models["weak"].price, max_output=2000, context=8000)
    tied = dataclasses.replace(both, models={**both.models, "strong": same})
    assert reasons(run(tied)) == {"weak": "", "strong": "as good as weak, listed later"}


def test_the_gap_is_measured_from_the_best() -> None:
    gap = policy(subject_to='{p_success_gap: "<= 0.10"}')
    assert run(gap, signals=MIDDLING).plan.model == "weak"
    assert reasons(run(gap, signals=MIDDLING))["local"] == "p_success 0.5 is 0.48 below the best, 0.1 allowed"
    assert run(gap, signals=measured(weak=0.9, strong=0.91)).degraded == "probe_unavailable"


def test_cost_goes_before_quality() -> None:
    capped = policy(subject_to='{p_success: ">= 0.9", cost: "<= $0.001"}')
    decision = run(capped, signals=HARD)
    assert decision.plan.model == "weak"
    assert decision.rule.endswith("otherwise best (highest p_success) with cost <= $0.001")
    nothing = policy(candidates="[weak, strong]", subject_to='{cost: "<= $0.0001"}')
    assert run(nothing).rule == "no candidate meets cost <= $0.0001; cheapest"
    assert run(nothing).plan.model == "weak"


def test_use_takes_the_first_available() -> None:
    listed = policy(use="[strong, weak, local]")
    assert reasons(run(listed)) == {"strong": "", "weak": "listed after strong", "local": "listed after strong"}
    decision = run(listed, state=State({"strong": "breaker open"}))
    assert (decision.plan.model, decision.degraded) == ("weak", "unavailable")
    assert decision.rule == "first available of strong, weak, local"
    assert reasons(decision)["strong"] == "unavailable: breaker open"
    assert run(listed, state=State({}, 10_000_000)).degraded == "budget"


def test_a_named_model_goes_straight_to_it() -> None:
    decision = run(policy(), query("other"))
    assert (decision.plan.model, decision.route, decision.fallbacks) == ("other", "named", ())
    assert decision.rule == "the caller named other"


def test_a_route_for_a_model_adds_what_follows() -> None:
    named = routes("  - {name: s, when: {model: strong}, use: [strong], on_failure: [weak]}\n")
    assert run(named, query("strong")).fallbacks == ("weak",)
    assert named.aliases == ()


def test_a_tag_goes_before_a_named_model() -> None:
    private = routes("  - {name: private, when: {tag: private}, use: [local, weak]}\n")
    tagged = frozenset({"private", "x"})
    decision = run(private, query("weak", tags=tagged))
    assert (decision.plan.model, decision.route) == ("weak", "private")
    assert decision.rule == "first available of local, weak (only weak, which the caller named)"
    assert run(private, query("anything", tags=tagged)).plan.model == "local"
    with pytest.raises(NoCandidate, match="does not offer `strong`; it offers local, weak") as caught:
        run(private, query("strong", tags=tagged))
    assert caught.value.kind == "not_allowed"


def test_a_model_that_a_route_names_is_reached_through_it_only() -> None:
    guarded = routes("  - {name: out, when: {model: strong, tag: public}, use: [strong]}\n")
    assert run(guarded, query("strong", tags=frozenset({"public"}))).route == "out"
    with pytest.raises(NoCandidate) as caught:
        run(guarded, query("strong"))
    assert caught.value.kind == "not_allowed"


def test_a_route_without_conditions_catches_unknown_names_only() -> None:
    catching = routes("  - {name: t, when: {tenant: tenant, model: x}, use: [weak]}\n  - {name: rest, use: [local]}\n")
    assert run(catching, query("gpt-4o")).route == "rest"
    assert run(catching, query("x")).route == "t"
    assert run(catching, query("x", tenant="b")).route == "rest"
    assert run(catching, query("strong")).route == "named"


def test_an_unknown_model() -> None:
    with pytest.raises(NoCandidate, match="`nope` is neither a model nor an alias") as caught:
        run(policy(), query("nope"))
    assert caught.value.kind == "unknown_model"


@pytest.mark.parametrize(
    ("asked", "state", "kind", "reason"),
    [
        (
            query("local", input_tokens_estimate=2000, text=b"word " * 1024),
            State(),
            "context_length",
            "does not fit: at least 1024 tokens in and 1 out, context 1024",
        ),
        (query("local", max_output_tokens=1000, text=b"a " * 25), State(), "context_length", "25 tokens in and 1000"),
        (query("weak", max_output_tokens=3000), State(), "context_length", "answers at most 2000 tokens, 3000 asked"),
        (query("local", needs_tools=True), State(), "capability", "cannot call tools"),
        (query("other", needs_logprobs=True), State(), "capability", "cannot return log probabilities"),
        (query("weak"), State({}, 4_099_999), "budget", r"may cost \$0.0041, budget left \$0.004099999"),
        (query("weak"), State({}, -5), "budget", "budget left -"),
        (query("weak"), State({"weak": "engine down"}), "unavailable", "unavailable: engine down"),
    ],
)
def test_why_nothing_can_run(asked: Query, state: State, kind: str, reason: str) -> None:
    with pytest.raises(NoCandidate, match=reason) as caught:
        run(policy(), asked, state=state)
    assert caught.value.kind == kind


LONG = Signals(input_tokens={"local": 50_000, "weak": 50_000})


def test_the_kind_is_of_the_model_that_came_closest() -> None:
    with pytest.raises(NoCandidate) as caught:
        run(policy(), signals=LONG, state=State({"strong": "down"}))
    assert caught.value.kind == "unavailable"
    with pytest.raises(NoCandidate) as caught:
        run(policy(), signals=LONG, state=State({"strong": "down"}, 0))
    assert caught.value.kind == "budget"
    assert [model for model, _ in caught.value.reasons] == ["local", "weak", "strong"]
    reserved = policy(candidates="[local]", on_failure="[strong]")
    with pytest.raises(NoCandidate) as caught:
        run(reserved, signals=LONG, state=State({"strong": "down"}))
    assert caught.value.kind == "unavailable"


def test_what_certainly_does_not_fit_is_not_sent() -> None:
    exact = Signals(input_tokens={"local": 1024})
    with pytest.raises(NoCandidate, match="does not fit: 1024 tokens in and 1 out, context 1024"):
        run(policy(), query("local"), exact)
    assert run(policy(), query("local", input_tokens_estimate=90_000), Signals(input_tokens={"local": 1023}))
    fewest = query("local", input_tokens_estimate=1300, text=b"word " * 1023)
    assert run(policy(), fewest).plan.model == "local"
    with pytest.raises(NoCandidate) as caught:
        run(policy(), msgspec.structs.replace(fewest, text=b"word " * 1024))
    assert caught.value.kind == "context_length"


@given(st.lists(st.sampled_from(["word", "  ", " ", "    ", "\t", "x=1;", "日本", "\\n"]), max_size=200))
def test_the_fewest_tokens_are_no_more_than_the_runs_of_spaces(parts: list[str]) -> None:
    text = "".join(parts)
    least = least_input_tokens(query(text=text.encode()))
    assert 0 <= least <= len(re.findall(" +", text))
    assert least == sum(len(run) % 2 for run in re.findall(" +", text))


def test_what_may_fit_is_sent_where_nothing_else_takes_it() -> None:
    doubtful = query(input_tokens_estimate=9_000)
    decision = run(policy(), doubtful)
    assert decision.plan.model == "strong"
    assert reasons(decision)["weak"] == "likely does not fit: about 9000 tokens in and 1 out, context 8000"
    assert run(policy(), doubtful, state=State({"strong": "down"})).plan.model == "local"
    assert run(policy(candidates="[weak]", on_failure="[strong]"), doubtful).plan.model == "strong"
    assert run(policy(), query("weak", input_tokens_estimate=9_000)).plan.model == "weak"


def test_the_bytes_of_a_picture_are_no_tokens() -> None:
    picture = query("local", input_tokens_estimate=1_000_000, input_tokens_max=None)
    assert run(policy(), picture).plan.model == "local"


def test_a_longer_context_in_reserve_steps_in() -> None:
    reserved = policy(candidates="[local]", on_failure="[strong]")
    decision = run(reserved, query(input_tokens_estimate=50_000))
    assert (decision.plan.model, decision.degraded) == ("strong", "context_length")


def test_exact_token_counts_go_before_the_estimate() -> None:
    assert run(policy(), signals=Signals(input_tokens={"local": 5000})).plan.model == "weak"


def test_an_empty_budget_leaves_what_is_free() -> None:
    decision = run(policy(subject_to=P90), signals=MIDDLING, state=State({}, 0))
    assert (decision.plan.model, decision.degraded) == ("local", "budget")
    assert run(policy(subject_to=P90), signals=EASY, state=State({}, 0)).degraded == ""


def test_the_reserve() -> None:
    reserved = policy(subject_to=P90, on_failure="[strong, weak, local, other]")
    decision = run(reserved, query(max_output_tokens=950), MIDDLING, State({"other": "down"}))
    assert (decision.plan.model, decision.fallbacks) == ("weak", ("strong",))
    assert "does not fit" in reasons(decision)["local"]
    assert reasons(decision)["other"] == "unavailable: down"
    assert reasons(decision)["strong"] == ""


def test_the_reserve_steps_in_when_no_candidate_can_run() -> None:
    reserved = policy(candidates="[weak, strong]", on_failure="[strong, local]")
    decision = run(reserved, state=State({"weak": "down", "strong": "down"}))
    assert (decision.plan.model, decision.fallbacks, decision.degraded) == ("local", (), "unavailable")
    assert decision.rule == "first of on_failure, as no candidate can run"


def test_which_heads_to_ask() -> None:
    assert policy(subject_to=P90).heads_for(query()) == {"local": "local", "weak": "weak", "strong": "strong"}
    assert policy().heads_for(query()) == {}, "the cheapest needs no probe"
    assert policy(subject_to=P90).heads_for(query("weak")) == {}


def test_costs_are_rounded_up_and_count_the_dearest_class() -> None:
    model = Model("m", "p", "m", 1000, None, Price(1, 0, 3, 2, 5), True, True, True)
    two = query(input_tokens_estimate=100, choices=2)
    assert costs_nanousd(model, two, 100) == (1, 1)  # (100*1 + 2*400*2) / 1e6 and (100*3 + 2*1000*5) / 1e6, up
    dear = dataclasses.replace(model, price=Price(10**6, 0, 3 * 10**6, 2 * 10**6, 5 * 10**6))
    assert costs_nanousd(dear, two, 100) == (100 + 1600, 300 + 10000)
    short = query(max_output_tokens=10)
    assert costs_nanousd(dear, short, 100) == (100 + 20, 300 + 50)
    cached = dataclasses.replace(dear, price=Price(10**6, 10**5, 10**6, 2 * 10**6, 2 * 10**6))
    assert costs_nanousd(cached, short, 100, 3, 60) == (40 + 6 + 6, 100 + 20), "60 of 100 cached, 3 tokens expected"
    assert costs_nanousd(cached, short, 100, 50, 600) == (10 + 20, 100 + 20), (
        "no more cached than there are, none longer"
    )
    unpriced = dataclasses.replace(model, price=None)
    assert costs_nanousd(unpriced, two, 100) == (None, None)


# Properties

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


def test_told_to_a_person() -> None:
    decision = run(policy(subject_to=P90, on_failure="[local]"), signals=MIDDLING, seed=3)
    assert to_lines(decision) == [
        "weak, by route auto: cheapest with p_success >= 0.9",
        "  local   P(success) 0.50 (0.25 to 1.00) by a@1  $0 expected, $0 at most  in reserve, number 1",
        "  weak    P(success) 0.92 (0.46 to 1.00) by a@1  $0.0009 expected, $0.0041 at most  chosen",
        "  strong  P(success) 0.98 (0.49 to 1.00) by a@1  $0.009 expected, $2.001 at most  costs $0.009, weak $0.0009",
        f"policy {decision.policy_version}, probe a@1, seed 3",
    ]
    short = msgspec.structs.replace(MIDDLING, out_tokens={"weak": Estimate(100, "a@1/weak.tokens", 50, 300)})
    told = next(one for one in run(policy(subject_to=P90), signals=short).candidates if one.model == "weak")
    assert told.measured_by == "a@1/weak"
    assert told.cost_low_nanousd is not None
    assert told.expected_cost_nanousd is not None
    written = told.expected_cost_nanousd - told.cost_low_nanousd
    assert told.cost_high_nanousd == told.expected_cost_nanousd + 4 * written, "200 tokens more, where it was 50 less"
    assert (
        f"expected ({format_money(told.cost_low_nanousd)} to" in to_lines(run(policy(subject_to=P90), signals=short))[2]
    )
    degraded = to_lines(run(policy(subject_to=P90)))
    assert degraded[1] == "degraded: probe_unavailable"
    assert "P(success) not known" in degraded[2]


def test_a_plan_of_another_version_is_refused() -> None:
    data = to_dict(run(policy())) | {"plan": {"kind": "oracle"}}
    with pytest.raises(ValueError, match="'oracle' - at"):
        from_dict(data)


LOCAL = Single("local", "high", 512)
PLANS: dict[str, Plan] = {
    "local+high": LOCAL,
    "weak>local+high": Cascade(
        (Single("weak"), LOCAL), Accept((("mean_logprob", 2.5), ("log_tokens", -0.3)), 1.0, 0.9)
    ),
    "draft~local": Speculate("draft", "local", "spec_reason", "high"),
    "local*5": Vote("local", 5, "majority"),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan_is_kept_whole_under_its_name_and_its_first_model(name: str) -> None:
    decision = msgspec.structs.replace(
        run(policy()), plan=PLANS[name], propensity=0.25, explored=True, shadow=("strong",)
    )
    kept = json.loads(json.dumps(to_dict(decision)))
    assert from_dict(kept) == decision
    assert from_dict(json.loads(msgspec.json.encode(decision))) == decision, "as the gateway keeps it in the ledger"
    assert (decision.plan.name, kept["plan"]["model"]) == (name, "weak" if ">" in name else "local")
    assert decision.effort == (None if name in ("weak>local+high", "local*5") else "high")
