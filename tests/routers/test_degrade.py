"""What a decision does when money runs short or a price is not known, and what it keeps for each cause of failure."""

import dataclasses
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.cost import worst_case_nanousd, worst_nanousd
from routers.decide import decide
from routers.errors import NoCandidate
from routers.explain import from_dict, to_dict, to_lines
from routers.load import parse
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State

HEAD = """\
version: 1
providers:
  home:   {engine: embedded, retries: 0}
  remote: {base_url: https://h/v1, retries: 2}
models:
  local:  {provider: home, model: base, context: 1024}
  weak:   {provider: remote, model: w, context: 8000, max_output: 1000, price: {input: $1/Mtok, output: $2/Mtok}}
  strong: {provider: remote, model: s, context: 100000, max_output: 1000, price: {input: $10/Mtok, output: $20/Mtok}}
  ghost:  {provider: remote, model: g, context: 8000, max_output: 1000, price: unpriced}
routes:
"""
CHEAPER = State(degrade="cheaper", degrade_reason="key alice is at 80% of its budget")
LOCAL = State(degrade="local", degrade_reason="key alice is at 95% of its budget")
ASKED = Query("auto", "t", input_tokens_estimate=100, max_output_tokens=None, input_tokens_max=100)


def policy(*lines: str) -> Policy:
    return parse(HEAD + "  - name: auto\n    when: {model: auto}\n" + "".join(f"    {line}\n" for line in lines))


def run(policy: Policy, query: Query = ASKED, state: State = State(), signals: Signals = Signals()) -> Decision:
    return decide(query, signals, policy, state, 0)


def reasons(decision: Decision) -> dict[str, str]:
    return {candidate.model: candidate.rejected for candidate in decision.candidates}


# thresholds


@pytest.mark.parametrize(
    "lines", [["use: [strong, weak]"], ["candidates: [weak, strong]", 'subject_to: {cost: "<= $1"}']]
)
def test_cheaper_takes_the_cheapest_whatever_the_route_says(lines: list[str]) -> None:
    decision = run(policy(*lines), state=CHEAPER)
    assert (decision.plan.model, decision.degraded) == ("weak", "budget")
    assert decision.rule == "cheapest, as key alice is at 80% of its budget"
    assert reasons(decision)["strong"] == "costs $0.009, weak $0.0009"


def test_cheaper_goes_before_a_refusal_and_takes_only_what_can_run() -> None:
    refusing = policy("candidates: [weak, strong]", 'subject_to: {cost: "<= $0.0001"}', "otherwise: refuse")
    with pytest.raises(NoCandidate):
        run(refusing)
    assert run(refusing, state=CHEAPER).plan.model == "weak"
    away = msgspec.structs.replace(CHEAPER, unavailable={"weak": "down"})
    assert run(refusing, state=away).plan.model == "strong"


def test_cheaper_leaves_a_named_model_alone() -> None:
    named = run(policy("use: [strong, weak]"), msgspec.structs.replace(ASKED, model="strong"), CHEAPER)
    assert (named.plan.model, named.rule, named.degraded) == ("strong", "the caller named strong", "")


def test_local_leaves_what_costs_nothing() -> None:
    decision = run(policy("use: [strong, ghost, local]", "on_failure: [weak]"), state=LOCAL)
    assert (decision.plan.model, decision.degraded, decision.fallbacks) == ("local", "budget", ())
    assert reasons(decision) == {
        "strong": "costs money, and key alice is at 95% of its budget",
        "ghost": "its price is not known, and key alice is at 95% of its budget",
        "local": "",
        "weak": "costs money, and key alice is at 95% of its budget",
    }
    for model in ("auto", "weak"):
        with pytest.raises(NoCandidate, match="95% of its budget") as caught:
            run(policy("use: [strong, weak]"), msgspec.structs.replace(ASKED, model=model), LOCAL)
        assert caught.value.kind == "budget"


# what is unpriced


def test_an_unpriced_model_never_wins_by_cost() -> None:
    decision = run(policy("candidates: [ghost, strong]"))
    assert (decision.plan.model, reasons(decision)["ghost"]) == (
        "strong",
        "its price is not known, strong costs $0.009",
    )
    assert run(policy("candidates: [ghost, strong]"), state=CHEAPER).plan.model == "strong"
    assert run(policy("use: [ghost, strong]")).plan.model == "ghost"
    assert run(policy("candidates: [ghost]")).plan.model == "ghost"


def test_an_unpriced_model_meets_no_bound_on_cost() -> None:
    bounded = policy("candidates: [ghost]", 'subject_to: {cost: "<= $9"}', "otherwise: refuse")
    with pytest.raises(NoCandidate, match=r"ghost: its price is not known, at most \$9 asked"):
        run(bounded)


def test_a_budget_cannot_hold_for_an_unpriced_model() -> None:
    with pytest.raises(NoCandidate, match="its price is not known, and a budget cannot hold for it") as caught:
        run(policy("use: [ghost]"), state=State(budget_remaining_nanousd=10**15))
    assert caught.value.kind == "budget"


def test_unpriced_is_told_as_such() -> None:
    decision = run(policy("use: [ghost, local]"))
    assert decision.candidates[0].expected_cost_nanousd is None
    assert "  ghost  P(success) not known  unpriced  chosen" in to_lines(decision)
    assert from_dict(json.loads(json.dumps(to_dict(decision)))) == decision
    lines = to_lines(decision, (policy("use: [ghost, local]"), ASKED))
    assert "worst case: not known, as a model that may answer is unpriced" in "\n".join(lines)


# what is kept for each cause


def test_fallbacks_by_cause() -> None:
    by_cause = policy(
        "use: [weak]", "on_failure: {error: [strong, local, weak], rate_limit: [local], content_filter: []}"
    )
    decision = run(by_cause)
    assert decision.fallbacks == ("strong", "local")
    assert decision.on_cause == {"rate_limit": ("local",), "context_length": ("strong",)}
    assert reasons(decision) == {"weak": "", "strong": "", "local": ""}
    assert from_dict(json.loads(json.dumps(to_dict(decision)))) == decision
    away = run(by_cause, state=State({"local": "down"}))
    assert (away.fallbacks, away.on_cause["rate_limit"]) == (("strong",), ())
    assert reasons(away)["local"] == "unavailable: down"


def test_a_list_for_all_causes() -> None:
    decision = run(policy("use: [weak]", "on_failure: [strong, local]"))
    assert decision.fallbacks == ("strong", "local")
    assert decision.on_cause == {"context_length": ("strong",), "content_filter": ("strong", "local")}
    assert run(policy("use: [weak]")).on_cause == {}


def test_a_reserve_for_one_cause_is_told() -> None:
    decision = run(policy("use: [weak]", "on_failure: {rate_limit: [strong], content_filter: [strong]}"))
    assert (decision.fallbacks, decision.on_cause["rate_limit"]) == ((), ("strong",))
    told = next(line for line in to_lines(decision) if line.startswith("  strong"))
    assert told.endswith("in reserve for content_filter and rate_limit")


def test_a_prompt_too_long_for_all_candidates_goes_to_the_list_for_it() -> None:
    longer = policy("use: [local]", "on_failure: {error: [weak], context_length: [strong]}")
    decision = run(longer, signals=Signals(input_tokens={"local": 5000}))
    assert (decision.plan.model, decision.degraded) == ("strong", "context_length")
    assert run(longer, state=State({"local": "down"})).plan.model == "weak"


def test_who_may_go_on_with_a_broken_stream() -> None:
    assert run(policy("use: [weak, local]")).resume == ()
    resuming = policy("use: [weak, strong, local]", "on_stream_failure: resume")
    assert run(resuming).resume == ("local",)
    assert run(resuming, state=State({"local": "down"})).resume == ()
    text = HEAD.replace("model: s,", "model: s, prefix: true,").replace("model: w,", "model: w, prefix: true,")
    route = (
        "  - {name: auto, when: {model: auto}, use: [weak, local], on_failure: [strong], on_stream_failure: resume}\n"
    )
    assert run(parse(text + route)).resume == ("strong", "local", "weak")


# the worst case


def test_the_worst_case_counts_every_attempt_that_may_be_billed() -> None:
    weak = worst_nanousd(policy("use: [weak]").models["weak"], ASKED) or 0
    strong = worst_nanousd(policy("use: [weak]").models["strong"], ASKED) or 0
    assert (weak, strong) == (2_100_000, 21_000_000)

    def worst(*lines: str) -> int | None:
        of = policy(*lines)
        return worst_case_nanousd(of, run(of), ASKED)

    assert worst("use: [weak]") == 3 * weak
    assert worst("use: [weak]", "on_failure: [local]") == 3 * weak
    assert worst("use: [weak]", "on_failure: [strong]") == 3 * weak + 3 * strong
    assert worst("use: [weak]", "on_failure: {rate_limit: [strong]}") == 3 * weak + 3 * strong
    assert worst("use: [weak]", "hedge: {after: 1s}") == 4 * weak
    assert worst("use: [weak]", "on_failure: [strong]", "hedge: {after: 1s}") == 3 * weak + 4 * strong
    assert worst("use: [local]", "on_failure: [weak]", "on_stream_failure: resume") == 3 * weak
    assert worst("use: [weak]", "on_failure: {content_filter: [ghost]}") is None
    of = policy("use: [weak]", "on_failure: [strong]")
    assert to_dict(run(of), (of, ASKED))["worst_case_nanousd"] == 3 * weak + 3 * strong
    told = "worst case: $0.0693, with every retry, fallback and hedge that the policy allows"
    assert told in to_lines(run(of), (of, ASKED))


def test_whoever_resumes_reads_the_answer_so_far() -> None:
    text = HEAD.replace("model: w,", "model: w, prefix: true,")
    of = parse(text + "  - {name: auto, when: {model: auto}, use: [weak], on_stream_failure: resume}\n")
    filled = (8000 * 1_000_000_000 + 1000 * 2_000_000_000) // 1_000_000
    assert worst_case_nanousd(of, run(of), ASKED) == 3 * 2_100_000 + filled


CAPS = st.none() | st.integers(1, 2000)


@given(
    st.integers(0, 5000),
    st.tuples(CAPS, CAPS),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
    st.booleans(),
    st.booleans(),
)
def test_asking_for_more_never_lowers_the_worst_case(
    tokens: int,
    caps: tuple[int | None, int | None],
    choices: tuple[int, int],
    retries: tuple[int, int],
    hedged: bool,
    resumed: bool,
) -> None:
    lines = ["use: [weak, local]", "on_failure: {error: [strong], rate_limit: [local, strong]}"]
    lines += ["hedge: {after: 1s}"] * hedged + ["on_stream_failure: resume"] * resumed
    of = policy(*lines)
    decision = run(of)

    def worst(cap: int | None, choices: int, retries: int) -> int:
        asked = Query("auto", "t", tokens // 4, cap, input_tokens_max=tokens, choices=choices)
        providers = {name: dataclasses.replace(p, retries=retries) for name, p in of.providers.items()}
        found = worst_case_nanousd(dataclasses.replace(of, providers=providers), decision, asked)
        assert found is not None
        each = [worst_nanousd(of.models[name], asked) or 0 for name in ("weak", "local", "strong")]
        assert found >= sum(each) * (1 + retries) + hedged * max(each)
        return found

    by_cap = sorted(caps, key=lambda cap: 10**9 if cap is None else cap)
    assert worst(by_cap[0], 1, 0) <= worst(by_cap[1], 1, 0)
    assert worst(caps[0], min(choices), 1) <= worst(caps[0], max(choices), 1)
    assert worst(caps[0], choices[0], min(retries)) <= worst(caps[0], choices[0], max(retries))
