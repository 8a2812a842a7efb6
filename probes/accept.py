"""Fits the accept rule of a cascade: P(correct | answer) by the log probabilities of its tokens and their number.

The threshold is the least one at which accepted answers are right often enough, by scores out of fold; or, where a
bound on the loss is asked for, the least that is certified: the rule is fitted on one half of the answers, and the
threshold taken from the other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

from probes.accept_rule import AcceptCertificate, Feature, FittedAccept
from probes.calibrate import Array
from probes.cells import at_row
from probes.certify import DELTA, Method, accept_losses, certify
from probes.errors import TableError

FEATURES: tuple[Feature, ...] = ("mean_logprob", "min_logprob", "log_tokens")
MIN_OF_CLASS = 20
"""Fewer right or wrong answers than this say nothing that holds."""


def answer_features(logprobs: Sequence[Sequence[float]]) -> Array:
    """[n, 3], in the order of `FEATURES`. Raises TableError for an answer without tokens, or with no numbers."""
    rows = []
    for number, values in enumerate(logprobs):
        tokens = np.asarray(values, np.float64)
        if tokens.size == 0 or not np.isfinite(tokens).all():
            raise TableError(f"{at_row(number)}: an answer needs the finite log probability of each of its tokens")
        rows.append((tokens.mean(), tokens.min(), np.log(tokens.size)))
    return np.array(rows, np.float64).reshape(-1, 3)


def logprobs_of(cell: object) -> list[float]:
    """The log probabilities that a cell holds: a list of numbers; or of tokens, as OpenAI's API returns them in
    `logprobs`, with or without `content` around them; each also as JSON. Raises ValueError."""
    if isinstance(cell, str | bytes):
        cell = json.loads(cell)
    if isinstance(cell, Mapping):
        cell = cell.get("content")
    if not isinstance(cell, Sequence) or isinstance(cell, str | bytes):
        raise ValueError("no list")
    return [float(one["logprob"] if isinstance(one, Mapping) else one) for one in cell]


def fit_accept(
    features: Array, correct: Array, *, right_at_least: float, folds: int = 5, seed: int = 0
) -> FittedAccept:
    """The rule over `features` [n, 3], from whether each answer is `correct` [n].

    Accepted answers shall be right with a share of `right_at_least`. Raises TableError where there are too few answers
    of a kind, or no threshold does it.
    """
    right = _right(correct)
    points, _, _ = _scaled(features)
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
    return _found(*_regression(features, right), at_least, p >= at_least, right)


def certified_accept(
    features: Array,
    correct: Array,
    *,
    alpha: float,
    stronger: Array | None = None,
    method: Method = "ltt",
    delta: float = DELTA,
    seed: int = 0,
) -> FittedAccept:
    """The rule whose accepted answers are wrong in at most a share `alpha` of all queries; with `stronger` [n], whether
    the model that is asked next is right: wrong where that one would have been right.

    Fitted on half of the rows, certified on the other. Raises TableError as `fit_accept`, and CertificateError where
    that half proves nothing.
    """
    right = _right(correct)
    train, test = train_test_split(np.arange(len(right)), test_size=0.5, random_state=seed, stratify=right)
    weights, bias = _regression(features[train], right[train])
    p = 1 / (1 + np.exp(-(bias + features[test] @ weights)))
    wrong = ~right[test] if stronger is None else ~right[test] & (np.asarray(stronger, np.float64)[test] > 0.5)
    losses = accept_losses(p, wrong.astype(np.float64))
    found = certify(losses, alpha, method, delta)
    above = p[p > found.value]
    if not above.size:
        raise TableError(
            f"a loss of at most {alpha:g} can be proven for no answer: the surest of {len(test)} are wrong too often; "
            "ask for a larger --alpha, or leave the cascade out"
        )
    # Between the last answer that is not accepted and the first that is: no rounding of another machine moves either.
    at_least = (max(found.value, 0.0) + float(above.min())) / 2
    certificate = AcceptCertificate(
        "accepted_wrong" if stronger is None else "weak_wrong_strong_right",
        method, alpha, found.delta, found.horizon, found.n, found.risk,
    )  # fmt: skip
    return _found(weights, bias, at_least, p >= at_least, right[test], certificate)


def digest(features: Array, *labels: Array) -> str:
    """Of what a rule was fitted on."""
    found = hashlib.sha256(np.ascontiguousarray(features, np.float64).tobytes())
    for column in labels:
        found.update(np.ascontiguousarray(column, np.float64).tobytes())
    return found.hexdigest()


def _right(correct: Array) -> Any:
    right = np.asarray(correct, np.float64) > 0.5
    rarer = int(min(right.sum(), (~right).sum()))
    if rarer < MIN_OF_CLASS:
        raise TableError(
            f"{rarer} of {len(right)} answers are of the rarer kind; {MIN_OF_CLASS} right and wrong are needed"
        )
    return right


def _scaled(features: Array) -> tuple[Array, Array, Array]:
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-9 * np.abs(mean), scale, 1.0)  # a feature that is the same everywhere says nothing
    return (features - mean) / scale, mean, scale


def _regression(features: Array, right: Any) -> tuple[Array, float]:
    """(weights, bias) over the features as they are."""
    points, mean, scale = _scaled(features)
    whole = LogisticRegression().fit(points, right)
    weights = whole.coef_[0] / scale
    return weights, float(whole.intercept_[0] - weights @ mean)


def _found(
    weights: Array, bias: float, at_least: float, kept: Any, right: Any, certificate: AcceptCertificate | None = None
) -> FittedAccept:
    return FittedAccept(
        weights=dict(zip(FEATURES, map(float, weights), strict=True)),
        bias=bias,
        at_least=at_least,
        keeps_right=float(kept[right].mean()),
        keeps_wrong=float(kept[~right].mean()),
        n=len(right),
        accepted=float(kept.mean()),
        accepted_right=float(right[kept].mean()),
        certificate=certificate,
    )
