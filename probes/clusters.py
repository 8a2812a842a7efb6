"""A table of clusters: how well each model does on queries that lie together. For many models and few labels.

Avengers-Pro (arXiv 2508.12631), the strongest router of the largest fair comparison so far: k-means over L2-normalised
embeddings, one score per cluster and model; a query is scored by its nearest centres, weighed by softmax(-beta x cosine
distance). Our two changes, each measured in docs/experiments.md: a cluster's rate is shrunk towards the model's mean
over all queries by so many pseudo-queries, so that a small cluster says little; and rates are kept as they are instead
of min-max normalised within the cluster, so that they are probabilities that a policy can bound.

Fitting needs scikit-learn; what comes out (`ClusterTable`) only numpy.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_is_fitted, validate_data

from probes.calibrate import Array
from probes.cluster_table import ClusterTable, unit
from probes.kinds import SPREAD
from probes.types import Kind

MIN_PER_CLUSTER = 10
"""Fewer queries than this on average to a cluster, and there are fewer clusters."""


class ClusterTableClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Estimator of a `ClusterTable`.

    Parameters: `clusters` at most; `nearest` centres that a query is scored by; `beta` of the softmax over their
    distances; `prior`, pseudo-queries at a model's mean that each cluster starts with; `seed` of k-means.

    y is [n] with any two classes, and then this is an ordinary binary classifier (`predict_proba` is [n, 2]); or y is
    [n, heads], scores from 0 to 1 with NaN where a head has none, and then `predict_proba` is [n, heads].
    Learnt: `table_`, `classes_`.
    """

    def __init__(
        self, clusters: int = 64, nearest: int = 3, beta: float = 9.0, prior: float = 10.0, seed: int = 0
    ) -> None:
        self.clusters = clusters
        self.nearest = nearest
        self.beta = beta
        self.prior = prior
        self.seed = seed

    def fit(self, X: Any, y: Any, names: tuple[str, ...] | None = None) -> Self:
        """Fit the clusters on all rows and the rates on the labelled ones; `names` label the heads."""
        X, scores = self._validate(X, y)
        points = unit(X)
        count = min(self.clusters, max(1, len(points) // MIN_PER_CLUSTER), len(np.unique(points, axis=0)))
        means = KMeans(count, random_state=self.seed, n_init=4).fit(points)
        self.table_ = ClusterTable(
            names or tuple(f"head{i}" for i in range(scores.shape[1])),
            unit(means.cluster_centers_).astype(np.float32),
            cluster_rates(means.labels_, count, scores, self.prior).astype(np.float32),
            min(self.nearest, count),
            self.beta,
        )
        return self

    def predict_proba(self, X: Any) -> Array:
        """[n, 2] in the order of `classes_`, or [n, heads] of P(correct)."""
        check_is_fitted(self)
        p = self.table_.predict_proba(validate_data(self, X, dtype=np.float64, reset=False))
        return p if self.multi_head_ else np.column_stack([1 - p[:, 0], p[:, 0]])

    def predict(self, X: Any) -> Any:
        """The likelier class, [n] or [n, heads]."""
        p = self.predict_proba(X)
        likelier = (p > 0.5).astype(int) if self.multi_head_ else p.argmax(axis=1)
        return self.classes_[likelier]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _validate(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Features [n, d] and scores [n, heads] from 0 to 1, or NaN."""
        given = np.asarray(y)
        self.multi_head_ = given.ndim == 2 and (given.dtype.kind == "f" or given.shape[1] > 1)
        if not self.multi_head_:
            X, y = validate_data(self, X, y, dtype=np.float64)
            self.classes_, encoded = _two_classes(y)
            return X, encoded.reshape(-1, 1)
        X = validate_data(self, X, dtype=np.float64)
        scores = np.asarray(y, np.float64)
        if len(scores) != len(X):
            raise ValueError(f"X has {len(X)} rows, y {len(scores)}")
        known = scores[~np.isnan(scores)]
        if ((known < 0) | (known > 1)).any():
            raise ValueError("scores of several heads must be from 0 to 1, or NaN")
        if (without := np.isnan(scores).all(axis=0)).any():
            raise ValueError(f"no score for heads {np.flatnonzero(without).tolist()}: leave them out")
        self.classes_ = np.array([0, 1])
        return X, scores


def fit_cluster_table(
    X: npt.NDArray[np.floating],
    labels: Array,
    kinds: Sequence[Kind],
    names: Sequence[str],
    clusters: int,
    seed: int = 0,
) -> tuple[ClusterTable, dict[int, tuple[float, float] | None]]:
    """Heads of every kind as rates of clusters, and the spreads of those for tokens, by column of `labels` [n, heads].

    A head without any label says even odds. Spreads are of the rows themselves.
    """
    known = ~np.isnan(labels)
    shares = [at for at, kind in enumerate(kinds) if kind != "out_tokens"]
    told = np.where(known.any(0), labels, 0.5)[:, shares]
    model = ClusterTableClassifier(clusters=clusters, seed=seed).fit(X, told)
    table = model.table_
    rates = np.ones((len(table.centres), len(kinds)))
    rates[:, shares] = table.rates
    home = table.weights(X)[0][:, 0]
    for at in sorted(set(range(len(kinds))) - set(shares)):
        if known[:, at].any():
            rates[:, at] = cluster_rates(home, len(rates), labels[:, [at]], model.prior)[:, 0]
    whole = ClusterTable(tuple(names), table.centres, rates.astype(np.float32), table.nearest, table.beta)
    values = whole.predict_proba(X)
    spreads: dict[int, tuple[float, float] | None] = {}
    for at in set(range(len(kinds))) - set(shares):
        ratio = labels[known[:, at], at] / values[known[:, at], at]
        low, high = np.quantile(ratio, SPREAD) if len(ratio) else (1.0, 1.0)
        spreads[at] = float(low), float(high)
    return whole, spreads


def cluster_rates(labels: npt.NDArray[np.integer], clusters: int, scores: Array, prior: float) -> Array:
    """[clusters, heads]: the mean score in each cluster, shrunk towards the mean of all by `prior` pseudo-queries.

    `labels` [n], the cluster of each row of `scores` [n, heads]; NaN is left out. Any quantity will do: correctness,
    tokens, dollars.
    """
    known = ~np.isnan(scores)
    overall = np.nanmean(scores, axis=0)
    counts, sums = np.zeros((clusters, scores.shape[1])), np.zeros((clusters, scores.shape[1]))
    np.add.at(counts, labels, known)
    np.add.at(sums, labels, np.where(known, scores, 0.0))
    total = counts + prior
    return np.asarray(np.where(total > 0, (sums + prior * overall) / np.where(total > 0, total, 1), overall))


def _two_classes(y: Any) -> tuple[Any, Array]:
    from sklearn.utils.multiclass import check_classification_targets

    check_classification_targets(y)
    classes, encoded = np.unique(y, return_inverse=True)
    if len(classes) > 2:
        raise ValueError(f"Only binary classification is supported. y has {len(classes)} classes.")
    if len(classes) < 2:
        raise ValueError("y has only one class; a classifier needs two.")
    return classes, encoded.astype(np.float64)
