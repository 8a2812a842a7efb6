"""Exploration: the share is exact, propensities are exact, hard constraints hold, and what is learned is used."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from probes.types import Estimate
from routers.aims import Explore
from routers.bandit import EVERYWHERE, belief, context_of, explore, learned, probabilities, updated
from routers.decide import decide
from routers.explain import to_lines
from routers.load import parse
from routers.policy import Policy
from routers.seeds import EXPLORE, EXPLORED_ARM, SHADOW, UNEXPLORED, draw
from routers.types import Arm, Query, Signals, State
from tests.routers.test_aims import HEAD, NAMES, measured

ASKED = Query("auto", "tenant", 100, None, input_tokens_max=100)
METHODS = st.sampled_from(["thompson", "softmax", "uniform"])
ARMS = st.dictionaries(
    st.tuples(st.sampled_from([-1, 0, 1, 7]), st.sampled_from(NAMES)),
    st.tuples(st.floats(0, 1000), st.floats(0, 1)).map(lambda pair: Arm(pair[0], pair[0] * pair[1])),
)
CLUSTERS = st.sampled_from([(), ((0, 1.0),), ((0, 0.7), (1, 0.3)), ((7, 0.5), (99, 0.5))])
SEEDS = st.integers(0, 2**63)
THEMSELVES = dict(zip(NAMES, NAMES, strict=True))


def policy(share: str = "10%", method: str = "thompson", **lines: str) -> Policy:
    fields = {"when": "{model: auto}", "candidates": "[weak, middle, strong]"} | lines
    fields["explore"] = f"{{share: {share}, method: {method}}}"
    return parse(HEAD + "  - name: auto\n" + "".join(f"    {key}: {value}\n" for key, value in fields.items()))


@given(SEEDS)
def test_a_draw_is_in_its_range_and_repeats(seed: int) -> None:
    assert 0 <= draw(seed, EXPLORE) < 1
    assert draw(seed, EXPLORE) == draw(seed, EXPLORE) == draw(seed + 2**64, EXPLORE)
    assert len({draw(seed, purpose) for purpose in (EXPLORE, EXPLORED_ARM, SHADOW)}) == 3


def test_draws_are_uniform_and_of_no_two_purposes_alike() -> None:
    """Even for seeds that count up: 20,000 draws in ten boxes, and the correlation of two purposes."""
    first, second = ([draw(seed, purpose) for seed in range(20_000)] for purpose in (EXPLORE, EXPLORED_ARM))
    for draws in (first, second):
        boxes = Counter(int(10 * value) for value in draws)
        assert max(abs(boxes[box] - 2000) for box in range(10)) < 200  # 4.7 standard deviations
    together = sum((a - 0.5) * (b - 0.5) for a, b in zip(first, second, strict=True)) / 20_000 * 12
    assert abs(together) < 0.04


@given(METHODS, ARMS, CLUSTERS, st.floats(0.01, 1), st.integers(2, 6))
def test_every_arm_can_be_drawn_and_the_chances_are_whole(
    method: str, arms: dict[tuple[int, str], Arm], clusters: tuple[tuple[int, float], ...], heat: float, count: int
) -> None:
    models = [*NAMES, "d", "e", "f"][:count]
    of = Explore(0.1, method, heat)  # type: ignore[arg-type]
    chances = probabilities(of, models, Signals(clusters=clusters), State(arms=arms))
    assert sum(chances) == pytest.approx(1)
    assert min(chances) > 0


def test_thompson_draws_an_arm_as_often_as_its_sample_is_the_highest() -> None:
    """Against samples of the Beta posteriors themselves."""
    arms = {(-1, "weak"): Arm(40, 20), (-1, "middle"): Arm(40, 26), (-1, "strong"): Arm(15, 10)}
    chances = probabilities(Explore(0.1), NAMES, Signals(), State(arms=arms))
    rng = random.Random(0)
    beliefs = [belief(arms, (), name) for name in NAMES]
    wins: Counter[int] = Counter()
    for _ in range(20_000):
        samples = [rng.betavariate(b.reward, b.pulls - b.reward) for b in beliefs]
        wins[samples.index(max(samples))] += 1
    assert chances == pytest.approx([wins[at] / 20_000 for at in range(3)], abs=0.02)


@given(METHODS, ARMS, CLUSTERS, st.sampled_from([0.05, 0.5, 1.0]), st.sampled_from(NAMES))
def test_the_propensities_of_all_plans_sum_to_one_and_the_share_is_exact(
    method: str, arms: dict[tuple[int, str], Arm], clusters: tuple[tuple[int, float], ...], share: float, best: str
) -> None:
    of, signals, state = Explore(share, method), Signals(clusters=clusters), State(arms=arms)  # type: ignore[arg-type]
    others = [name for name in NAMES if name != best]
    stated = dict(zip(others, probabilities(of, others, signals, state), strict=True))
    found: dict[str, float] = {}
    for seed in range(400):
        model, propensity = explore(of, best, NAMES, signals, state, seed)
        assert found.setdefault(model, propensity) == propensity, "it does not depend on the seed"
        assert (model, propensity) == explore(of, best, NAMES, signals, state, seed)
    for model, propensity in found.items():
        assert propensity == pytest.approx(1 - share if model == best else share * stated[model])
    assert explore(of, best, [best], signals, state, 0) == (best, 1.0), "nothing to explore"


def test_seeds_meet_the_share_and_the_propensities() -> None:
    of = policy("20%", "softmax")
    state = State(arms={(-1, "middle"): Arm(10, 8), (-1, "strong"): Arm(10, 6)})
    decisions = [decide(ASKED, Signals(), of, state, seed) for seed in range(5000)]
    explored = [decision for decision in decisions if decision.explored]
    assert len(explored) / 5000 == pytest.approx(0.2, abs=0.025)
    for model in NAMES:
        mine = [decision for decision in decisions if decision.plan.model == model]
        assert len(mine) / 5000 == pytest.approx(mine[0].propensity, abs=0.025)
        # inverse propensity scores: what is seen with probability p counts 1/p times
        assert sum(1 / decision.propensity for decision in mine) / 5000 == pytest.approx(1, abs=0.2)
    told = {candidate.model: candidate.rejected for candidate in explored[0].candidates}
    assert told["weak"] == f"the best, but this request explores {explored[0].plan.model}"
    assert explored[0].rule == f"cheapest; explored {explored[0].plan.model}, as 20% of requests do (softmax)"


P = st.floats(0, 1)


@given(st.tuples(P, P, P), METHODS, SEEDS, st.sampled_from(["best", "cheapest"]), ARMS)
def test_only_what_meets_the_constraints_is_explored(
    p: tuple[float, float, float], method: str, seed: int, otherwise: str, arms: dict[tuple[int, str], Arm]
) -> None:
    of = policy(
        "100%",
        method,
        subject_to='{p_success: ">= 0.6", cost: "<= $0.005"}',
        otherwise=otherwise,
        on_failure="[strong]",
    )
    state = State({"weak": "down"} if seed % 3 == 0 else {}, budget_remaining_nanousd=10**9, arms=arms)
    decision = decide(ASKED, measured(*p), of, state, seed)
    chosen = next(c for c in decision.candidates if c.model == decision.plan.model)
    meets = [
        name
        for name, value in zip(NAMES, p, strict=True)
        if value >= 0.6 and name != "strong" and name not in state.unavailable
    ]
    if decision.explored:
        assert decision.plan.model in meets
        assert chosen.expected_cost_nanousd is not None
        assert chosen.expected_cost_nanousd <= 5_000_000
    else:
        assert decision.propensity == 1.0 or len(meets) > 1
    if len(meets) < 2:
        assert not decision.explored
        assert decision.propensity == 1.0


@given(ARMS, CLUSTERS)
def test_what_is_learned_is_a_mean_between_its_bounds(
    arms: dict[tuple[int, str], Arm], clusters: tuple[tuple[int, float], ...]
) -> None:
    signals = learned(Signals(clusters=clusters), State(arms=arms), THEMSELVES)
    for estimate in signals.p_success.values():
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    probed = measured(0.9, None, None)
    assert learned(probed, State(arms=arms), THEMSELVES).p_success["weak"] == probed.p_success["weak"], (
        "a probe knows better"
    )


def test_feedback_moves_the_choice_of_the_cluster_it_is_about() -> None:
    of = policy("1%", objective="best")
    state = State(arms={})
    here, there = ((0, 1.0),), ((1, 1.0),)
    arms: dict[tuple[int, str], Arm] = {}
    for _ in range(30):
        arms = updated(arms, here, "weak", 1.0)
        arms = updated(arms, here, "strong", 0.0)
        arms = updated(arms, here, "middle", 0.5)
        for model in NAMES:
            arms = updated(arms, there, model, 1.0 if model == "strong" else 0.0)
    seed = next(seed for seed in range(100) if draw(seed, EXPLORE) > 0.5)
    state = State(arms=arms)
    assert decide(ASKED, Signals(clusters=here), of, state, seed).plan.model == "weak"
    assert decide(ASKED, Signals(clusters=there), of, state, seed).plan.model == "strong"


@given(st.floats(0, 1), st.floats(0.5, 1), CLUSTERS)
def test_an_update_counts_once_and_forgets(reward: float, keep: float, clusters: tuple[tuple[int, float], ...]) -> None:
    arms = updated(updated({}, clusters, "weak", 1.0), clusters, "weak", reward, keep)
    pulls = sum(arms[cluster, "weak"].pulls for cluster, _ in clusters or EVERYWHERE)
    assert pulls == pytest.approx(1 + keep)
    earned = sum(arms[cluster, "weak"].reward for cluster, _ in clusters or EVERYWHERE)
    assert earned == pytest.approx(reward + keep)


def test_a_reward_is_from_zero_to_one() -> None:
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            updated({}, (), "weak", reward)


@given(st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=6))
def test_domains_are_a_context_of_few_clusters(domain: dict[str, float]) -> None:
    clusters = context_of(domain)
    likely = sorted((p for p in domain.values() if p > 0), reverse=True)
    assert len(clusters) == min(3, len(likely))
    assert sum(weight for _, weight in clusters) == pytest.approx(1 if likely else 0)
    assert [weight for _, weight in clusters] == sorted((weight for _, weight in clusters), reverse=True)
    assert context_of(dict(reversed(domain.items()))) == clusters, "whatever their order"


def test_a_domain_is_always_the_same_cluster() -> None:
    assert context_of({"maths": 0.75, "law": 0.25}) == ((context_of({"maths": 1.0})[0][0], 0.75), (202069295, 0.25))


THINKS = HEAD.replace("model: w,", "model: w, thinking: {field: reasoning_effort},")


def efforts(**lines: str) -> Policy:
    fields = {"when": "{model: auto}", "explore": "{share: 40%, method: uniform}", "objective": "best"} | lines
    return parse(THINKS + "  - name: auto\n" + "".join(f"    {key}: {value}\n" for key, value in fields.items()))


def decided(of: Policy, arms: dict[tuple[int, str], Arm], signals: Signals = Signals(), query: Query = ASKED) -> str:
    """The best, whatever is explored."""
    seed = next(seed for seed in range(100) if draw(seed, EXPLORE) > 0.5)
    return decide(query, signals, of, State(arms=arms), seed).plan.name


def test_a_model_at_each_effort_is_an_arm_of_its_own() -> None:
    of = efforts(candidates="[weak+none, weak+high, strong]")
    good = {(-1, "weak+none"): Arm(20, 18), (-1, "weak+high"): Arm(20, 4), (-1, "strong"): Arm(20, 10)}
    assert decided(of, good) == "weak+none"
    assert decided(of, {**good, (-1, "weak+high"): Arm(20, 20)}) == "weak+high"
    decision = decide(ASKED, Signals(), of, State(arms=good), 0)
    assert decision.among == ("weak+none", "weak+high", "strong")
    assert decision.candidates[0].measured_by == "bandit/weak+none"


def test_the_arm_is_what_runs_whoever_chose_the_effort() -> None:
    """A route's effort is no part of its candidates' names; what it makes of them earns under its own name."""
    easy, hard = (Signals(difficulty=Estimate(value, "a@1/d")) for value in (0.1, 0.5))
    of = efforts(candidates="[weak, strong]", effort="auto")
    arms = {(-1, "weak+low"): Arm(20, 20), (-1, "weak+high"): Arm(20, 1), (-1, "strong"): Arm(20, 10)}
    assert decided(of, arms, easy) == "weak+low"
    assert decided(of, arms, hard) == "strong"
    decisions = [decide(ASKED, easy, of, State(arms=arms), seed) for seed in range(2000)]
    for decision in decisions:
        assert decision.among == ("weak+low", "strong")
        assert decision.plan.name in decision.among
        assert decision.propensity == pytest.approx(0.4 if decision.explored else 0.6)
    assert sum(decision.explored for decision in decisions) / 2000 == pytest.approx(0.4, abs=0.04)


def test_candidates_that_run_alike_are_one_arm() -> None:
    """Where the caller has said how much to think, `weak+none` and `weak+high` are the same call: between them there
    is nothing to draw, and the propensity is that of the call."""
    said = replace(ASKED, reasoning="medium")
    of = efforts(candidates="[weak+none, weak+high]")
    decision = decide(said, Signals(), of, State(), 0)
    assert (decision.plan.name, decision.propensity, decision.among, decision.explored) == ("weak", 1.0, (), False)
    three = efforts(candidates="[weak+none, weak+high, strong]")
    chances = {(d.plan.name, d.propensity) for d in (decide(said, Signals(), three, State(), s) for s in range(200))}
    assert chances == {("strong", 0.6), ("weak", 0.4)}


def test_a_cascade_earns_as_a_whole() -> None:
    accept = "{mean_logprob: 1, bias: 0, at_least: 0.5, keeps_right: 0.9, keeps_wrong: 0.2}"
    of = efforts(candidates="[weak>strong, middle]", accept=accept)
    arms = {(-1, "weak>strong"): Arm(20, 18), (-1, "middle"): Arm(20, 10)}
    assert decided(of, arms) == "weak>strong"
    assert decided(of, {**arms, (-1, "weak>strong"): Arm(20, 1)}) == "middle"
    known = measured(0.2, 0.9, 0.3)
    seed = next(seed for seed in range(100) if draw(seed, EXPLORE) > 0.5)
    probed = decide(ASKED, known, of, State(arms=arms), seed)
    assert probed.plan.name == "middle", "of stages that a probe speaks of, the cascade's P follows from theirs"


def test_who_asks_is_told_what_is_best_and_what_is_explored_beside_it() -> None:
    decision = decide(ASKED, Signals(), policy("90%", "uniform"), State(), UNEXPLORED)
    assert (decision.plan.name, decision.explored) == ("weak", False)
    assert "explores: 90% of such requests are answered by middle, strong" in to_lines(decision)
    explored = next(d for d in (decide(ASKED, Signals(), policy(), State(), seed) for seed in range(100)) if d.explored)
    assert not any(line.startswith("explores") for line in to_lines(explored)), "its rule says so"
