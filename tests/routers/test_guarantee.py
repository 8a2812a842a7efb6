"""Under a guarantee only those candidates answer that its certificate speaks for, whatever else a route wants."""

from dataclasses import replace

import pytest

from probes.types import Estimate
from routers.aims import Bound, Guarantee, GuaranteedLoss
from routers.decide import decide
from routers.errors import NoCandidate
from routers.load import parse
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State

TEXT = """\
version: 1
providers: {p: {base_url: https://h/v1}}
models:
  small: {provider: p, model: s, price: {input: $1/Mtok, output: $1/Mtok}}
  mid: {provider: p, model: m, price: {input: $2/Mtok, output: $2/Mtok}}
  big: {provider: p, model: b, price: {input: $3/Mtok, output: $3/Mtok}}
signals: {difficulty: {probe: default}}
routes:
  - name: auto
    when: {model: auto}
    candidates: [small, mid, big]
    guarantee: {loss: weak_wrong_strong_right, at_most: 0.05}
"""


def policy(bound: Bound | None, loss: GuaranteedLoss = "weak_wrong_strong_right", more: str = "") -> Policy:
    loaded = parse(TEXT + more)
    (route,) = loaded.routes
    return replace(loaded, routes=(replace(route, guarantee=Guarantee(loss, 0.05, bound=bound)),))


def ask(of: Policy, p: dict[str, float], state: State | None = None) -> Decision:
    signals = Signals(p_success={name: Estimate(value, "t") for name, value in p.items()})
    return decide(Query("auto", "t", 10, None), signals, of, state or State(), seed=0)


ALL = Bound(("small", "mid", "big"), -0.125, "proof")


@pytest.mark.parametrize(
    ("p", "chosen", "why"),
    [
        ({"small": 0.85, "mid": 0.9, "big": 0.9}, "small", {}),
        (
            {"small": 0.7, "mid": 0.85, "big": 0.9},
            "mid",
            {"small": "p_success -0.2 from big, the guarantee asks for more than -0.125"},
        ),
        ({"small": 0.5, "mid": 0.75, "big": 0.875}, "big", {"mid": "p_success -0.125 from big"}),  # equal is not above
        ({"small": 0.99, "mid": 0.9}, "big", {"small": "p_success of big not known"}),
        ({"small": 0.99, "big": 0.1}, "big", {"mid": "p_success not known"}),
        ({}, "big", {"small": "p_success not known"}),
    ],
)
def test_the_first_candidate_within_the_threshold_answers_else_the_last(
    p: dict[str, float], chosen: str, why: dict[str, str]
) -> None:
    decision = ask(policy(ALL), p)
    assert decision.plan.model == chosen
    reasons = {candidate.model: candidate.rejected for candidate in decision.candidates}
    for name, words in why.items():
        assert reasons[name].startswith(words)
    assert "guarantee weak_wrong_strong_right <= 0.05 (threshold -0.125, proof)" in decision.rule


HARD = {"small": 0.5, "mid": 0.5, "big": 0.9}


def test_neither_an_objective_nor_what_is_otherwise_goes_past_it() -> None:
    of = policy(ALL, more="    subject_to: {p_success: '>= 0.99'}\n    otherwise: cheapest\n")
    assert ask(of, HARD).plan.model == "big"
    assert ask(of, HARD, State(degrade="cheaper", degrade_reason="x")).plan.model == "big"


def test_where_nobody_may_answer_the_request_is_refused_or_falls_back_and_says_so() -> None:
    down = State(unavailable={"big": "down"})
    with pytest.raises(NoCandidate) as caught:
        ask(policy(ALL), HARD, down)
    assert "the guarantee asks for more" in str(caught.value)
    fallback = policy(ALL, more="    on_failure: [mid]\n")
    fallen = ask(fallback, HARD, down)
    assert (fallen.plan.model, fallen.degraded) == ("mid", "unavailable")
    failed = ask(fallback, HARD)
    assert (failed.plan.model, failed.fallbacks) == ("big", ("mid",))


def test_without_a_certificate_only_the_last_candidate_answers() -> None:
    decision = ask(policy(None), {"small": 0.99, "mid": 0.99, "big": 0.1})
    assert decision.plan.model == "big"
    assert decision.candidates[0].rejected == "the guarantee has no certificate"


def test_an_accepted_answer_needs_the_probes_word_and_the_others_do_not() -> None:
    of = policy(Bound(("small",), 0.8, "proof"), "accepted_wrong")
    assert ask(of, {"small": 0.81, "mid": 0.1, "big": 0.1}).plan.model == "small"
    assert ask(of, {"small": 0.8, "mid": 0.1, "big": 0.1}).plan.model == "mid"
    assert ask(of, {}).plan.model == "mid"
