"""Decisions: the right model, for the reason the policy states, and never by chance."""

import dataclasses
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.cost import costs_nanousd, least_input_tokens
from routers.errors import NoCandidate
from routers.policy import Model, Price
from routers.types import Query, Signals, State
from tests.routers.deciding import EASY, HARD, MIDDLING, P90, measured, policy, query, reasons, routes, run


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
            "does not fit: at least 1024 tokens in and 1 out, context 1024$",
        ),
        (
            query("local", max_output_tokens=1000, text=b"a " * 25),
            State(),
            "context_length",
            "at least 25 tokens in and 1000 out, context 1024; send a max_tokens below 999$",
        ),
        (query("weak", max_output_tokens=3000), State(), "context_length", "3000 asked; send max_tokens: 2000"),
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
    with pytest.raises(NoCandidate, match=r"does not fit: 1024 tokens in and 1 out, context 1024$"):
        run(policy(), query("local"), exact)
    counted, longest = Signals(input_tokens={"local": 1000}), query("local", max_output_tokens=24)
    assert run(policy(), longest, counted).plan.model == "local"
    with pytest.raises(NoCandidate, match=r"1000 tokens in and 25 out, context 1024; send max_tokens: 24$"):
        run(policy(), msgspec.structs.replace(longest, max_output_tokens=25), counted)
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
