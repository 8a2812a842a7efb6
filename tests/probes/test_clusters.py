"""The table of clusters: near queries share their rates, few labels say little, and inference needs numpy alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes.cluster_table import ClusterTable
from probes.clusters import ClusterTableClassifier, cluster_rates


@parametrize_with_checks([ClusterTableClassifier()])  # type: ignore[untyped-decorator]
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def _islands(n: int = 900, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three directions, each good for one of three models: features, scores, island."""
    rng = np.random.default_rng(seed)
    island = rng.integers(3, size=n)
    X = np.eye(3, 8)[island] * 5 + rng.normal(size=(n, 8)) * 0.5
    right = rng.random((n, 3)) < np.where(np.eye(3)[island] > 0, 0.9, 0.3)
    return X, right.astype(float), island


def test_each_query_goes_to_the_model_of_its_island() -> None:
    X, y, _ = _islands()
    model = ClusterTableClassifier(clusters=12).fit(X, y, names=("a", "b", "c"))
    fresh, _, where = _islands(seed=1)
    p = model.predict_proba(fresh)
    assert (p.argmax(1) == where).mean() > 0.99
    assert np.abs(p - np.where(np.eye(3)[where] > 0, 0.9, 0.3)).mean() < 0.05
    assert model.table_.names == ("a", "b", "c")


def test_a_head_learns_from_its_labelled_rows_only() -> None:
    X, y, _ = _islands()
    holes = y.copy()
    holes[300:, 0] = np.nan
    few = ClusterTableClassifier(clusters=12).fit(X, holes)
    np.testing.assert_array_equal(
        few.predict_proba(X)[:, 1:], ClusterTableClassifier(clusters=12).fit(X, y).predict_proba(X)[:, 1:]
    )
    assert (
        np.abs(few.predict_proba(X)[:, 0] - ClusterTableClassifier(clusters=12).fit(X, y).predict_proba(X)[:, 0]).max()
        > 0
    )


def test_a_cluster_with_few_labels_says_little() -> None:
    scores = np.array([[1.0], [1.0], [0.0], [0.0], [np.nan]])
    labels = np.array([0, 1, 1, 1, 2])
    rates = cluster_rates(labels, 3, scores, prior=2.0)
    np.testing.assert_allclose(rates[:, 0], [(1 + 2 * 0.5) / 3, (1 + 2 * 0.5) / 5, 0.5])
    np.testing.assert_allclose(cluster_rates(labels, 3, scores, prior=0.0)[:, 0], [1, 1 / 3, 0.5])


def test_bad_scores_are_refused() -> None:
    X, y, _ = _islands(60)
    with pytest.raises(ValueError, match="from 0 to 1"):
        ClusterTableClassifier().fit(X, y * 2)
    y[:, 1] = np.nan
    with pytest.raises(ValueError, match=r"no score for heads \[1\]"):
        ClusterTableClassifier().fit(X, y)
    with pytest.raises(ValueError, match="X has 60 rows, y 59"):
        ClusterTableClassifier().fit(X, y[1:])


TABLE = ClusterTable(
    ("a", "b"), np.eye(4, 6, dtype=np.float32), np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2), 3, 9.0
)


@settings(deadline=None)
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 5), st.just(6)), elements=st.floats(-1e3, 1e3)))
def test_every_query_gets_a_probability_between_those_of_its_clusters(features: np.ndarray) -> None:
    order, weight = TABLE.weights(features)
    np.testing.assert_allclose(weight.sum(1), 1)
    assert (np.diff(weight, axis=1) <= 1e-12).all(), "nearest first"
    p = TABLE.predict_proba(features)
    near = TABLE.rates[order]
    assert (p >= near.min(1) - 1e-6).all()
    assert (p <= near.max(1) + 1e-6).all()
    np.testing.assert_allclose(TABLE.predict_proba(features * 7), p, atol=1e-6, err_msg="only the direction counts")
