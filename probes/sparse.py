"""The probe over sparse features as a scikit-learn estimator: one logistic regression per head, calibrated.

As `kernel.ProbeClassifier`, but linear, and without scaling: text features come scaled, and centring would fill them.
"""

from typing import Any, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.validation import check_is_fitted, validate_data

from probes.calibrate import Array, Calibrator, fit_platt
from probes.multi_head import MultiHeadClassifier

MIN_OF_CLASS = 2
"""Fewest labels of the rarer class for which cross-validation means anything; below it a head is its base rate."""


class SparseProbeClassifier(MultiHeadClassifier):
    """Calibrated multi-head linear probe over sparse or dense features.

    Parameters: `Cs`, inverse regularisation strengths of which each head picks the one with the least calibrated
    out-of-fold log loss; `cv` folds; `seed` of the folds. y is [n] with any two classes, or [n, heads] in {0, 1} with
    NaN where a head has no label; `predict_proba` is [n, 2], or [n, heads] of P(1).
    Learnt: `coef_` [heads, d], `intercept_` [heads], `calibrators_`, `C_` [heads] (NaN: too few labels, the head is its
    base rate), `classes_`, and `oof_` [n, heads], calibrated probabilities of the training rows out of fold.
    """

    def __init__(self, Cs: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0), cv: int = 5, seed: int = 0) -> None:
        self.Cs = Cs
        self.cv = cv
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Self:
        """Fit all heads, each on the rows that have its label."""
        X, labels = self._validate(X, y)
        fitted = [self._fit_head(X, column) for column in labels.T]
        self.coef_ = np.stack([coef for coef, *_ in fitted])
        self.intercept_ = np.array([intercept for _, intercept, *_ in fitted])
        self.calibrators_: tuple[Calibrator, ...] = tuple(calibrator for _, _, calibrator, *_ in fitted)
        self.C_ = np.array([strength for *_, strength, _ in fitted])
        self.oof_ = np.column_stack([oof for *_, oof in fitted])
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _probabilities(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        scores = np.asarray(X @ self.coef_.T) + self.intercept_
        return np.column_stack([calibrate(scores[:, at]) for at, calibrate in enumerate(self.calibrators_)])

    def _validate(self, X: Any, y: Any) -> tuple[Any, Array]:
        """Features [n, d] and labels [n, heads] as 0, 1, NaN."""
        self.multi_head_ = np.asarray(y).ndim == 2
        if self.multi_head_:
            X = validate_data(self, X, accept_sparse="csr", dtype=np.float64)
            labels = np.asarray(y, np.float64)
            if labels.shape[0] != X.shape[0]:
                raise ValueError(f"X has {X.shape[0]} rows, y {labels.shape[0]}")
            if not np.isin(labels[~np.isnan(labels)], [0, 1]).all():
                raise ValueError("labels of several heads must be 0, 1 or NaN")
            self.classes_ = np.array([0, 1])
            return X, labels
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        return X, self._binary(y)

    def _fit_head(self, X: Any, column: Array) -> tuple[Array, float, Calibrator, float, Array]:
        """(coef, intercept, calibrator, C, out-of-fold probabilities) of one head."""
        known = np.flatnonzero(~np.isnan(column))
        rows, y = X[known], column[known]
        oof = np.full(len(column), np.nan)
        rarer = int(min(y.sum(), len(y) - y.sum()))
        if rarer < MIN_OF_CLASS:
            constant = fit_platt(np.zeros(len(y)), y)
            oof[known] = constant(np.zeros(len(y)))
            return np.zeros(X.shape[1]), 0.0, constant, float("nan"), oof
        splits = list(StratifiedKFold(min(self.cv, rarer), shuffle=True, random_state=self.seed).split(y, y))
        best: tuple[float, float, Array, Calibrator] | None = None
        for strength in self.Cs:
            scores = np.empty(len(y))
            for train, test in splits:
                scores[test] = _logistic(strength, rows).fit(rows[train], y[train]).decision_function(rows[test])
            calibrator: Calibrator = fit_platt(scores, y)
            p = np.clip(calibrator(scores), 1e-12, 1 - 1e-12)
            loss = -float(np.mean(np.where(y > 0.5, np.log(p), np.log1p(-p))))
            if best is None or loss < best[0]:
                best = loss, strength, scores, calibrator
        if best is None:
            raise ValueError("Cs is empty: give at least one inverse regularisation strength")
        _, strength, scores, calibrator = best
        oof[known] = calibrator(scores)
        model = _logistic(strength, rows).fit(rows, y)
        return model.coef_[0], float(model.intercept_[0]), calibrator, strength, oof


def _logistic(strength: float, X: Any) -> LogisticRegression:
    """Coordinate descent where rows are sparse, its intercept all but free of regularisation; else Newton's method."""
    if issparse(X):
        return LogisticRegression(C=strength, solver="liblinear", intercept_scaling=10.0, random_state=0)
    return LogisticRegression(C=strength, solver="newton-cholesky", max_iter=200)
