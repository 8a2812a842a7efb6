"""The estimator keeps scikit-learn's promises and its own: missing labels, folding, calibration."""

from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes.calibrate import Isotonic, ece, sigmoid
from probes.linear import ProbeClassifier

EXPECTED_FAILURES = {
    "check_supervised_y_2d": "a column of labels means one head, not a vector to be ravelled",
}


@parametrize_with_checks([ProbeClassifier()], expected_failed_checks=lambda _: EXPECTED_FAILURES)  # type: ignore[untyped-decorator]
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def _problem(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and true probabilities of two heads."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 12)) * np.linspace(0.1, 5, 12) + 3
    z = (X - 3) / np.linspace(0.1, 5, 12)
    p = sigmoid(np.column_stack([z[:, 0] + z[:, 5], z[:, 1] - z[:, 7] + 1]))
    return X, (rng.random(p.shape) < p).astype(float), p


@pytest.mark.parametrize("components", [None, 11], ids=["plain", "pca"])
def test_probabilities_are_near_the_truth(components: int | None) -> None:
    X, y, truth = _problem()
    model = ProbeClassifier(components=components).fit(X, y)
    assert np.abs(model.predict_proba(X) - truth).mean() < (0.03 if components is None else 0.1)
    assert ece(model.predict_proba(X)[:, 0], y[:, 0]) < 0.04


def test_a_head_learns_from_its_labelled_rows_only() -> None:
    X, y, _ = _problem()
    holes = y.copy()
    holes[1000:, 0] = np.nan
    alone = ProbeClassifier(components=None).fit(X, holes)
    wrong = np.where(np.isnan(holes), 1 - y, holes)
    assert (
        np.abs(
            alone.predict_proba(X)[:, 0] - ProbeClassifier(components=None).fit(X, wrong).predict_proba(X)[:, 0]
        ).max()
        > 0.3
    )
    np.testing.assert_allclose(
        alone.predict_proba(X)[:, 1], ProbeClassifier(components=None).fit(X, y).predict_proba(X)[:, 1], atol=1e-6
    )


def test_a_head_with_one_class_is_its_smoothed_base_rate() -> None:
    X, y, _ = _problem(200)
    y[:, 0] = 0.0
    model = ProbeClassifier().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X)[:, 0], 1 / 202, rtol=1e-6)
    assert np.isnan(model.C_[0])


def test_each_head_is_calibrated_by_the_number_of_its_labels() -> None:
    X, y, _ = _problem(3200)
    y[:600, 0] = np.nan
    few, many = ProbeClassifier().fit(X, y).heads_.calibrators
    assert not isinstance(few, Isotonic)
    assert isinstance(many, Isotonic)


def test_labels_other_than_0_1_are_refused() -> None:
    X, y, _ = _problem(100)
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        ProbeClassifier().fit(X, y * 2)
