"""What classifiers of several heads answer, whatever they read: scikit-learn's shapes over calibrated probabilities."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from probes.calibrate import Array


class MultiHeadClassifier(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn ships no types
    """Needs `multi_head_`, `classes_` and `_probabilities`: with one head an ordinary binary classifier."""

    multi_head_: bool
    classes_: Any

    def predict_proba(self, X: Any) -> Array:
        """Calibrated probabilities: [n, 2] in the order of `classes_`, or [n, heads] of P(1)."""
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

    @abstractmethod
    def _probabilities(self, X: Any) -> Array:
        """[n, heads] of P(1)."""

    def _binary(self, y: Any) -> Array:
        """Labels [n, 1] in {0, 1} of any two classes, which become `classes_`. Raises ValueError for others."""
        check_classification_targets(y)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ValueError(f"Only binary classification is supported. y has {len(self.classes_)} classes.")
        if len(self.classes_) < 2:
            raise ValueError("y has only one class; a classifier needs two.")
        return np.asarray(encoded.reshape(-1, 1), np.float64)
