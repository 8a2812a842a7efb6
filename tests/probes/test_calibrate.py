"""Calibration turns scores into shares that come true."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from probes.calibrate import (
    Array,
    Calibrator,
    Isotonic,
    Platt,
    _smoothed,
    bands,
    brier,
    ece,
    fit_calibrator,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    reliability,
    sigmoid,
)
from probes.types import interval

SAMPLES = st.lists(st.tuples(st.floats(-30, 30, allow_subnormal=False), st.booleans()), min_size=2, max_size=60).map(
    lambda pairs: (np.array([z for z, _ in pairs]), np.array([float(y) for _, y in pairs]))
)


def test_platt_recovers_a_known_sigmoid() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, 40_000)
    labels = (rng.random(40_000) < sigmoid(0.7 * scores - 0.4)).astype(float)
    platt = fit_platt(scores, labels)
    assert platt.slope == pytest.approx(0.7, abs=0.03)
    assert platt.intercept == pytest.approx(-0.4, abs=0.03)
    assert ece(platt(scores), labels) < 0.012


def test_platt_stays_finite_on_separable_labels() -> None:
    platt = fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    p = platt(np.array([-100.0, -1.0, 1.0, 100.0]))
    assert np.isfinite([platt.slope, platt.intercept]).all()
    assert 0 < p[1] < 0.5 < p[2] < 1


def test_a_score_that_ranks_backwards_gets_the_smoothed_base_rate() -> None:
    platt = fit_platt(np.array([2.0, 1.0, -1.0, -2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert platt == Platt(0.0, 0.0)


@given(SAMPLES)
def test_platt_is_monotone_and_a_probability(sample: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = sample
    p = fit_platt(scores, labels)(np.sort(scores))
    assert ((p >= 0) & (p <= 1)).all()
    assert (np.diff(p) >= 0).all()


@given(SAMPLES)
def test_platt_does_not_depend_on_the_scale_of_the_score(sample: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = sample
    np.testing.assert_allclose(fit_platt(scores, labels)(scores), fit_platt(scores * 8, labels)(scores * 8), atol=1e-4)


@given(SAMPLES)
def test_isotonic_agrees_with_the_least_squares_fit_at_the_middle_of_each_block(
    sample: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, labels = sample
    fitted = fit_isotonic(scores, labels)
    plain = IsotonicRegression(out_of_bounds="clip").fit(scores, labels).predict(scores)
    least = 1 / (len(labels) + 2)
    # scikit-learn merges scores closer than its own tolerance; ours are compared where they are apart.
    if np.diff(np.unique(scores)).min(initial=1.0) > 1e-6:
        for value in np.unique(plain.round(9)):
            block = np.abs(plain - value) < 1e-8
            (found,) = fitted(np.array([scores[block].mean()]))
            assert found == pytest.approx(np.clip(value, least, 1 - least), abs=1e-6)
    assert (np.diff(fitted.x) > 0).all()
    assert (np.diff(fitted(np.sort(scores))) >= -1e-12).all()


def test_isotonic_ties_no_queries_between_its_ends() -> None:
    scores = np.arange(100.0)
    fitted = fit_isotonic(scores, np.tile([0.0, 1.0, 0.0, 0.0, 1.0], 20))
    assert len(fitted.x) > 2
    inside = scores[(scores > fitted.x[0]) & (scores < fitted.x[-1])]
    assert (np.diff(fitted(inside)) > 0).all()
    assert 0 < fitted.y[0] < fitted.y[-1] < 1


@given(SAMPLES)
@example((np.array([0.0, -4.5e-194]), np.array([0.0, 0.0])))
@example((np.array([0.0, -1e-9]), np.array([0.0, 0.0])))
def test_a_temperature_is_the_best_slope(sample: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = sample
    fitted = fit_temperature(scores, labels)
    targets = _smoothed(labels)

    def loss(slope: float) -> float:
        return float(np.sum(np.logaddexp(0.0, slope * scores) - targets * slope * scores))

    if fitted.slope == 0:
        assert fitted == fit_platt(np.zeros(len(labels)), labels)
        return
    assert fitted.intercept == 0
    step = 1e-4 / (float(np.abs(scores).max()) or 1.0)
    assert loss(fitted.slope) <= min(loss(fitted.slope + step), loss(max(0.0, fitted.slope - step))) + 1e-9


def test_the_number_of_labels_chooses_the_calibrator() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=3000)
    labels = (rng.random(3000) < sigmoid(2 * scores + 1)).astype(float)
    for n, fit in [(20, fit_temperature), (299, fit_temperature), (300, fit_platt), (2999, fit_platt)]:
        assert fit_calibrator(scores[:n], labels[:n]) == fit(scores[:n], labels[:n])
    assert isinstance(fit_calibrator(scores, labels), Isotonic)


def test_of_few_labels_a_temperature_makes_the_better_probabilities_and_of_many_isotonic_regression() -> None:
    """The rule's reason, on a score whose log-odds are right up to a factor, and on one that no sigmoid fits."""
    rng = np.random.default_rng(3)
    scores = rng.normal(0.5, 1.5, 20_000)
    labels = (rng.random(20_000) < sigmoid(scores)).astype(float)
    bent = (rng.random(20_000) < np.where(scores > 0, 0.9, 0.35)).astype(float)

    def worth(fit: Callable[[Array, Array], Calibrator], y: Array, n: int) -> float:
        """Mean Brier score of fits on disjoint parts of n rows."""
        fresh = scores[10_000:], y[10_000:]
        starts = range(0, 10_000 - n + 1, n)
        return float(np.mean([brier(fit(scores[i : i + n], y[i : i + n])(fresh[0]), fresh[1]) for i in starts]))

    assert worth(fit_temperature, labels, 50) < worth(fit_platt, labels, 50) < worth(fit_isotonic, labels, 50)
    assert worth(fit_isotonic, bent, 5000) < worth(fit_platt, bent, 5000)


@given(SAMPLES)
def test_ece_and_brier_are_shares(sample: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = sample
    p = sigmoid(scores)
    assert 0 <= ece(p, labels) <= 1
    assert 0 <= brier(p, labels) <= 1


def test_ece_of_honest_and_of_boastful_probabilities() -> None:
    labels = np.tile([1.0, 0.0, 0.0, 0.0], 100)
    assert ece(np.full(400, 0.25), labels, bins=1) == pytest.approx(0)
    assert ece(np.full(400, 0.95), labels) == pytest.approx(0.7)


def test_equal_probabilities_stay_in_one_bin() -> None:
    """Split by position, a constant's bins would show the order of the rows as miscalibration."""
    labels = np.repeat([1.0, 0.0], [100, 300])
    assert ece(np.full(400, 0.25), labels) == pytest.approx(0)
    assert len(reliability(np.full(400, 0.25), labels)) == 1


@given(SAMPLES, st.integers(1, 20))
def test_the_reliability_table_holds_every_query_once(sample: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    scores, labels = sample
    p = sigmoid(scores)
    table = reliability(p, labels, bins)
    assert sum(one.n for one in table) == len(p)
    assert sum(one.n * one.share for one in table) == pytest.approx(labels.sum())
    assert sum(one.n * one.mean for one in table) == pytest.approx(p.sum())
    assert all(one.high < other.low for one, other in pairwise(table))
    assert all(one.share_low <= one.share + 1e-12 <= one.share_high + 2e-12 for one in table)
    if len(np.unique(p)) == len(p):
        assert max(one.n for one in table) - min(one.n for one in table) <= 1


def test_wilsons_interval() -> None:
    """10 of 100: 5.5% to 17.4%, as published tables have it."""
    (one,) = reliability(np.full(100, 0.1), np.repeat([1.0, 0.0], [10, 90]), 1)
    assert (one.share_low, one.share_high) == pytest.approx((0.0552, 0.1744), abs=1e-4)


def test_bands_hold_the_truth_of_most_words_and_say_nothing_of_few_rows() -> None:
    """Of 4,000 rows whose truth is p squared: an overconfident word is outside of its band, the truth within."""
    rng = np.random.default_rng(0)
    p = rng.random(4000)
    found = bands(p, (rng.random(4000) < p**2).astype(float))
    assert len(found) == 20
    assert [most for most, _, _ in found] == sorted(most for most, _, _ in found)
    assert found[-1][0] == 1.0
    held = 0
    for at, (most, low, high) in enumerate(found):
        inside = p[(p <= most) & (p > (found[at - 1][0] if at else -1))]
        held += low <= (inside**2).mean() <= high
        assert low < high
    assert held >= 17
    middle = interval(found, 0.5)
    assert middle is not None
    assert middle[0] < 0.25 < middle[1] == 0.5, "stretched to hold the word itself"
    assert bands(p[:49], np.ones(49)) == ()
    assert interval((), 0.5) is None
    holes = np.where(np.arange(4000) % 2, p, np.nan)
    assert len(bands(holes, np.ones(4000))) == 20
    (alike,) = bands(np.full(200, 0.5), np.ones(200))
    assert alike == pytest.approx((1.0, 0.981, 1.0), abs=0.001)
