"""The probe as a scikit-learn estimator: scale, project, one logistic regression per head, calibrate.

Correctness heads of several models are fitted side by side; a router takes the difference of their probabilities.
Training needs scikit-learn; what comes out (`heads_`) needs only numpy.
"""

from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from probes.calibrate import Array, Calibrator, fit_calibrator, fit_isotonic, fit_platt
from probes.heads import Heads

MIN_OF_CLASS = 2
"""Fewest labels of the rarer class for which cross-validation means anything; below it a head is its base rate."""


class ProbeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Calibrated multi-head linear probe.

    Parameters: `components` of the PCA after scaling (None: no PCA); `Cs`, inverse regularisation strengths of which
    each head picks the one with the least calibrated out-of-fold log loss; `cv` folds; `calibration`, fitted on the
    out-of-fold scores at that strength ("auto": by the number of the head's labels); `seed` of PCA and folds.

    y is [n] with any two classes, and then this is an ordinary binary classifier (`predict_proba` is [n, 2]); or
    y is [n, heads] in {0, 1} with NaN where a head has no label, and then `predict_proba` is [n, heads], P(correct).
    Learnt: `heads_` (numpy-only inference), `C_` [heads] (NaN: too few labels, the head is its base rate), `classes_`.
    """

    def __init__(
        self,
        components: int | None = 256,
        Cs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1),
        cv: int = 5,
        calibration: Literal["auto", "platt", "isotonic"] = "auto",
        seed: int = 0,
    ) -> None:
        self.components = components
        self.Cs = Cs
        self.cv = cv
        self.calibration = calibration
        self.seed = seed

    def fit(self, X: Any, y: Any, names: tuple[str, ...] | None = None) -> Self:
        """Fit all heads; `names` label them in `heads_`."""
        X, labels = self._validate(X, y)
        scaler = StandardScaler().fit(X)
        reduced = scaler.transform(X)
        basis = np.eye(X.shape[1])
        # Never more components than rows; and where PCA would only rotate, it is left out.
        components = X.shape[1] if self.components is None else min(self.components, *X.shape)
        if components < X.shape[1]:
            # Centred by the scaler, so the mean that PCA would subtract is zero.
            basis = PCA(components, random_state=self.seed).fit(reduced).components_.T
            reduced = reduced @ basis
        weights, biases, calibrators, strengths = zip(*(self._fit_head(reduced, c) for c in labels.T), strict=True)
        weight = (np.stack(weights) @ basis.T) / scaler.scale_
        self.C_ = np.array(strengths)
        self.heads_ = Heads(
            names or tuple(f"head{i}" for i in range(labels.shape[1])),
            weight.astype(np.float32),
            (np.array(biases) - weight @ scaler.mean_).astype(np.float32),
            calibrators,
        )
        return self

    def predict_proba(self, X: Any) -> Array:
        """Calibrated probabilities: [n, 2] in the order of `classes_`, or [n, heads] of P(correct)."""
        p = self._probabilities(X)
        return p if self.multi_head_ else np.column_stack([1 - p[:, 0], p[:, 0]])

    def decision_function(self, X: Any) -> Array:
        """Calibrated log-odds, [n] or [n, heads]."""
        p = np.clip(self._probabilities(X), 1e-15, 1 - 1e-15)
        scores = np.asarray(np.log(p) - np.log1p(-p))
        return scores if self.multi_head_ else scores[:, 0]

    def predict(self, X: Any) -> Any:
        """The likelier class, [n] or [n, heads]."""
        likelier = (self._probabilities(X) > 0.5).astype(int)
        return self.classes_[likelier if self.multi_head_ else likelier[:, 0]]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _probabilities(self, X: Any) -> Array:
        check_is_fitted(self)
        return self.heads_.predict_proba(validate_data(self, X, dtype=np.float64, reset=False))

    def _validate(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Features [n, d] and labels [n, heads] as 0, 1, NaN."""
        self.multi_head_ = np.asarray(y).ndim == 2
        if self.multi_head_:
            X = validate_data(self, X, dtype=np.float64)
            labels = np.asarray(y, np.float64)
            if len(labels) != len(X):
                raise ValueError(f"X has {len(X)} rows, y {len(labels)}")
            if not np.isin(labels[~np.isnan(labels)], [0, 1]).all():
                raise ValueError("labels of several heads must be 0, 1 or NaN")
            self.classes_ = np.array([0, 1])
            return X, labels
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ValueError(f"Only binary classification is supported. y has {len(self.classes_)} classes.")
        if len(self.classes_) < 2:
            raise ValueError("y has only one class; a classifier needs two.")
        return X, encoded.reshape(-1, 1).astype(np.float64)

    def _fit_head(self, X: Array, y: Array) -> tuple[Array, float, Calibrator, float]:
        """(weight, bias, calibrator, C) of one head on its labelled rows."""
        X, y = X[~np.isnan(y)], y[~np.isnan(y)]
        rarer = int(min(y.sum(), len(y) - y.sum()))
        if rarer < MIN_OF_CLASS:
            return np.zeros(X.shape[1]), 0.0, fit_platt(np.zeros(len(y)), y), float("nan")
        splits = StratifiedKFold(min(self.cv, rarer), shuffle=True, random_state=self.seed)
        best: tuple[float, float, Array] | None = None
        for strength in self.Cs:
            scores = np.empty(len(y))
            for train, test in splits.split(X, y):
                scores[test] = _logistic(strength).fit(X[train], y[train]).decision_function(X[test])
            p = np.clip(fit_platt(scores, y)(scores), 1e-12, 1 - 1e-12)
            loss = -float(np.mean(np.where(y > 0.5, np.log(p), np.log1p(-p))))
            if best is None or loss < best[0]:
                best = loss, strength, scores
        if best is None:
            raise ValueError("Cs is empty: give at least one inverse regularisation strength")
        _, strength, scores = best
        fits = {"auto": fit_calibrator, "platt": fit_platt, "isotonic": fit_isotonic}
        calibrator = fits[self.calibration](scores, y)
        model = _logistic(strength).fit(X, y)
        return model.coef_[0], float(model.intercept_[0]), calibrator, strength


def _logistic(strength: float) -> LogisticRegression:
    """Newton with a Cholesky solve: exact and quick where rows far outnumber columns, as after the PCA."""
    return LogisticRegression(C=strength, solver="newton-cholesky", max_iter=200)
