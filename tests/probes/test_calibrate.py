"""Calibration turns scores into shares that come true."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from probes.calibrate import Platt, brier, ece, fit_isotonic, fit_platt, sigmoid

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
def test_isotonic_is_the_least_squares_monotone_fit(sample: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = sample
    fitted = fit_isotonic(scores, labels)
    oracle = IsotonicRegression(out_of_bounds="clip").fit(scores, labels)
    # scikit-learn merges scores closer than its own tolerance; ours are compared where they are apart.
    if np.diff(np.unique(scores)).min(initial=1.0) > 1e-6:
        np.testing.assert_allclose(fitted(scores), oracle.predict(scores), atol=1e-9)
    assert (np.diff(fitted(np.sort(scores))) >= -1e-12).all()


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
