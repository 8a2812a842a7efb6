"""Trajectories whose truth is known: made, not generated."""

import numpy as np
import pytest

from probes.calibrate import Array, sigmoid
from probes.errors import CertificateError
from probes.exits import BELOW_ALL, Cues, exit_losses, fit, fit_budget, halves, leave, quality, resplit, threshold


def made(n: int, seed: int, *, cues: int = 4, spread: float = 1.5) -> tuple[Cues, Array]:
    """Trajectories of up to `cues` cues that share a difficulty; p is a noisy look at the chance of being right."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, cues + 1, n)
    of = np.repeat(np.arange(n), counts)
    hard = rng.normal(1.0, 1.5, n)
    z = hard[of] + rng.normal(0, 0.5, len(of))
    right = rng.random(len(of)) < sigmoid(z)
    seen = z + rng.normal(0, spread, len(of))
    values = np.column_stack([seen, rng.normal(size=len(of))])
    return Cues(n, of.astype(np.intp), values, right, rng.random(n) < sigmoid(hard)), sigmoid(seen)


def test_a_trajectory_counts_once_by_its_worst_cue() -> None:
    of = np.array([0, 0, 2, 2, 2])
    right = np.array([True, False, False, True, False])
    p = np.array([0.9, 0.4, 0.2, 0.8, 0.6])
    cues = Cues(4, of, p[:, None], right, np.array([True, True, False, True]))
    losses = exit_losses(cues, p, "wrong")
    assert (losses.n, sorted(losses.at)) == (4, [0.4, 0.6])
    assert sorted(exit_losses(cues, p, "harm").at) == [0.4], "trajectory 2 would have ended wrong anyway"
    left = leave(cues, p, 0.5)
    assert left.at.tolist() == [0, -1, 3, -1]
    assert left.right.tolist() == [True, True, True, True]
    assert leave(cues, p, 0.1).risk == 0.25
    assert leave(cues, p, 0.1, "harm").risk == 0.0


@pytest.mark.parametrize("loss", ["wrong", "harm"])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
def test_in_expectation_the_risk_is_at_most_delta(delta: float, loss: str) -> None:
    cues, p = made(4000, seed=1)
    found = resplit(cues, p, delta, "expected", "wrong" if loss == "wrong" else "harm")
    # The mean over splits of one sample may be off by that sample's noise: three standard errors of it.
    assert found.risks.mean() <= delta + 3 * np.sqrt(delta * (1 - delta) / cues.n)
    assert found.shares_left.mean() > 0.02, "and it does leave"


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
def test_with_high_probability_the_risk_is_at_most_delta(delta: float) -> None:
    held = []
    for seed in range(4):
        cues, p = made(3000, seed=seed)
        held.append(resplit(cues, p, delta, "high_probability", splits=100, seed=seed).held)
    assert np.mean(held) >= 0.95


def test_the_published_rule_breaks_its_promise_per_request() -> None:
    """Four in ten trajectories are wrong at all of their eight cues, and each cue has noise of its own."""
    rng = np.random.default_rng(3)
    n, delta = 4000, 0.1
    of = np.repeat(np.arange(n), 8)
    right = np.repeat(rng.random(n) < 0.6, 8)
    p = sigmoid(np.where(right, 1.0, -1.0) + rng.normal(0, 1.0, 8 * n))
    cues = Cues(n, of, p[:, None], right, np.ones(n, np.bool_))
    above = threshold(cues, p, delta, "per_event")
    assert (p[~right] > above).mean() <= delta, "per wrong event it holds"
    assert resplit(cues, p, delta, "per_event", splits=40).risks.mean() > 2 * delta
    assert resplit(cues, p, delta, "expected", splits=40).risks.mean() <= delta + 0.01


def test_too_few_trajectories_for_a_delta_are_refused() -> None:
    cues, p = made(50, seed=5)
    with pytest.raises(CertificateError, match="50 rows are too few to certify"):
        threshold(cues, p, 0.01, "expected")
    with pytest.raises(CertificateError, match="too few"):
        threshold(cues, p, 0.05, "high_probability")
    with pytest.raises(CertificateError, match="of a class are too few for delta"):
        threshold(cues, p, 0.001, "per_event")


def test_a_delta_above_all_risk_leaves_everywhere() -> None:
    cues, p = made(2000, seed=6)
    assert threshold(cues, p, 0.99, "expected") == BELOW_ALL
    left = leave(cues, p, BELOW_ALL)
    assert ((left.at >= 0) == np.isin(np.arange(cues.n), cues.of)).all()


def test_the_fit_finds_what_there_is() -> None:
    cues, _ = made(3000, seed=7)
    fitted = fit(cues)
    fresh, best = made(3000, seed=8)
    found = fitted.predict(fresh.values)
    assert quality(fresh, found)["auc"] >= quality(fresh, best)["auc"] - 0.01
    assert abs(found.mean() - fresh.right.mean()) < 0.03
    assert abs(fitted.weight[0]) > 10 * abs(fitted.weight[1])


def test_a_fit_of_one_class_is_refused() -> None:
    cues, _ = made(200, seed=9)
    always = Cues(cues.n, cues.of, cues.values, np.ones_like(cues.right), cues.right_at_end)
    with pytest.raises(CertificateError, match="wrong at 0: a fit needs 20 of each"):
        fit(always)
    p = np.full(len(cues.of), 0.5)
    with pytest.raises(CertificateError, match="none of 200 trajectories"):
        threshold(always, p, 0.1, "expected")


def test_trajectories_can_be_taken_in_any_order() -> None:
    cues, _ = made(30, seed=10)
    rows = np.random.default_rng(0).permutation(30)[:11]
    some = cues.take(rows.astype(np.intp))
    for at, row in enumerate(rows):
        assert (some.values[some.of == at] == cues.values[cues.of == row]).all()
    assert cues.take(np.empty(0, np.intp)).n == 0


def test_a_budget_is_a_quantile() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, 60, 2000).astype(float)
    needed = 5 + 2 * prompt + rng.exponential(10, 2000)
    base, slope = fit_budget(prompt, needed)
    assert abs((needed <= base + slope * prompt).mean() - 0.9) < 0.02
    assert abs(slope - 2) < 0.2


def test_halves_belong_to_the_key() -> None:
    keys = [f"question {n}" for n in range(2000)]
    half = halves(keys)
    assert abs(half.mean() - 0.5) < 0.05
    assert (halves(keys[::-1])[::-1] == half).all()
