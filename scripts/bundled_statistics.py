"""Shares, orderings and probes for the cards of the bundled models."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """The 95% Wilson score interval of a share."""
    p, scale = right / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((middle - half) / scale, 4), round((middle + half) / scale, 4)]


def out_of_fold(features: Floats, label: Bools, folds: int = 5) -> Floats:
    """P(label) of a logistic regression that did not see the example."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01 if features.shape[1] > 10 else 1.0, max_iter=500))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    scores: Floats = cross_val_predict(probe, features, label, cv=split, method="predict_proba")[:, 1]
    return scores


def auc(score: Floats, label: Bools, draws: int = 300) -> list[float]:
    """The area under the ROC curve and its 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(label), size=len(label)) for _ in range(draws)]
    spread = np.quantile([_auc(score[at], label[at]) for at in drawn], (0.025, 0.975))
    return [round(float(value), 3) for value in (_auc(score, label), *spread)]


def auc_within(score: Floats, label: Bools, group: Floats) -> float:
    """The share of (right, wrong) pairs of the same group that the score puts in order; ties count half."""
    won = pairs = 0.0
    for value in np.unique(group):
        inside = group == value
        count = float(label[inside].sum() * (~label[inside]).sum())
        if count:
            won += _auc(score[inside], label[inside]) * count
            pairs += count
    return round(won / pairs, 3) if pairs else math.nan


def _auc(score: Floats, label: Bools) -> float:
    good = int(label.sum())
    if not 0 < good < len(label):
        return math.nan
    ranks = rankdata(score)
    return float((ranks[label].sum() - good * (good + 1) / 2) / (good * (len(label) - good)))
