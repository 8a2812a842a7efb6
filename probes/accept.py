"""Fits the accept rule of a cascade: P(correct | answer) by the log probabilities of its tokens and their number.

The rule's numbers go into the route's `accept`, as text: weights, bias, the threshold, and the shares of right and of
wrong answers that it keeps, counted out of fold. The threshold is the least one at which accepted answers are right
often enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from probes.calibrate import Array
from probes.errors import TableError

FEATURES = ("mean_logprob", "min_logprob", "log_tokens")
MIN_OF_CLASS = 20
"""Fewer right or wrong answers than this say nothing that holds."""


@dataclass(frozen=True, slots=True)
class FittedAccept:
    weights: dict[str, float]
    bias: float
    at_least: float
    keeps_right: float
    keeps_wrong: float
    n: int
    accepted: float
    """Share of all answers."""
    accepted_right: float
    """Of the accepted answers, the share that is right, out of fold."""

    def __str__(self) -> str:
        """As a policy writes it."""
        numbers = {**self.weights, "bias": self.bias, "at_least": self.at_least}
        numbers |= {"keeps_right": self.keeps_right, "keeps_wrong": self.keeps_wrong}
        return "accept: {" + ", ".join(f"{name}: {value:.4g}" for name, value in numbers.items()) + "}"


def answer_features(logprobs: Sequence[Sequence[float]]) -> Array:
    """[n, 3], in the order of `FEATURES`. Raises TableError for an answer without tokens, or with no numbers."""
    rows = []
    for number, values in enumerate(logprobs):
        tokens = np.asarray(values, np.float64)
        if tokens.size == 0 or not np.isfinite(tokens).all():
            raise TableError(f"row {number}: an answer needs the finite log probability of each of its tokens")
        rows.append((tokens.mean(), tokens.min(), np.log(tokens.size)))
    return np.array(rows, np.float64).reshape(-1, 3)


def fit_accept(
    features: Array, correct: Array, *, right_at_least: float, folds: int = 5, seed: int = 0
) -> FittedAccept:
    """The rule over `features` [n, 3], from whether each answer is `correct` [n].

    Accepted answers shall be right with a share of `right_at_least`. Raises TableError where there are too few answers
    of a kind, or no threshold does it.
    """
    right = np.asarray(correct, np.float64) > 0.5
    rarer = int(min(right.sum(), (~right).sum()))
    if rarer < MIN_OF_CLASS:
        raise TableError(
            f"{rarer} of {len(right)} answers are of the rarer kind; {MIN_OF_CLASS} right and wrong are needed"
        )
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    points = (features - mean) / scale
    p = np.empty(len(right))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(points, right):
        p[test] = LogisticRegression().fit(points[train], right[train]).predict_proba(points[test])[:, 1]
    order = np.argsort(-p, kind="stable")
    share_right = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last_of_tie = np.append(p[order][1:] < p[order][:-1], True)
    enough = np.flatnonzero((share_right >= right_at_least) & last_of_tie)
    if not enough.size:
        raise TableError(f"no threshold makes accepted answers right with a share of {right_at_least:g}; ask for less")
    at_least = float(p[order][enough[-1]])
    kept = p >= at_least
    whole = LogisticRegression().fit(points, right)
    weight = whole.coef_[0] / scale
    return FittedAccept(
        dict(zip(FEATURES, map(float, weight), strict=True)),
        float(whole.intercept_[0] - weight @ mean),
        at_least,
        float(kept[right].mean()),
        float(kept[~right].mean()),
        len(right),
        float(kept.mean()),
        float(right[kept].mean()),
    )
