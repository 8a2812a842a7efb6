"""Heads that foretell something other than a yes: tokens of the answer (log-linear), and the domain (multinomial).

Both are linear in the same features as the correctness heads, so an artifact holds them as further rows of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, cross_val_predict

from probes.calibrate import Array, Calibrator, Exp
from probes.evaluate import Row
from probes.heads import Heads
from probes.sparse import SparseProbeClassifier
from probes.types import Kind

SPREAD = (0.1, 0.9)
"""Quantiles of actual over foretold tokens that the interval of a head spans."""
STILL = 1e-6
"""The least spread by which a feature is scaled."""
ALPHAS = (0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True, slots=True)
class LinearHead:
    """score = features @ coef + intercept; for tokens `spread` is the interval, as multiples of exp(score)."""

    coef: Array
    intercept: float
    spread: tuple[float, float] | None = None


def fit_tokens(X: Any, tokens: Array, seed: int = 0) -> LinearHead:
    """Ridge regression of log tokens, its strength by 5-fold error; NaN where the length is not known.

    exp(score) is the mean, not the median: the mean of exp(residual), out of fold, is in the intercept (Duan, 1983).
    """
    known = np.flatnonzero(~np.isnan(tokens))
    rows, y = X[known], np.log(np.maximum(tokens[known], 1.0))
    folds = KFold(min(5, len(y)), shuffle=True, random_state=seed)
    best: tuple[float, float, Array] | None = None
    for alpha in ALPHAS:
        foretold = cross_val_predict(Ridge(alpha), rows, y, cv=folds)
        error = float(np.mean((y - foretold) ** 2))
        if best is None or error < best[0]:
            best = error, alpha, foretold
    assert best is not None, "there are strengths to choose from"
    _, alpha, foretold = best
    ratio = np.exp(np.clip(y - foretold, -10, 10))
    mean = float(ratio.mean())
    low, high = (float(q) / mean for q in np.quantile(ratio, SPREAD))
    model = Ridge(alpha).fit(rows, y)
    return LinearHead(model.coef_, float(model.intercept_) + float(np.log(mean)), (low, high))


def fit_domains(X: Any, member: Array, strength: float = 1.0) -> list[LinearHead]:
    """Multinomial regression of the domain; `member` [n, domains] is 1 in the column of each row's, NaN if unknown."""
    known = np.flatnonzero(~np.isnan(member).any(1))
    named = member[known].argmax(1)
    model = LogisticRegression(C=strength, max_iter=300).fit(X[known], named)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        model.coef_, model.intercept_ = (
            np.vstack([-model.coef_, model.coef_]) / 2,
            np.array([-1, 1]) * model.intercept_ / 2,
        )
    heads = [LinearHead(np.zeros(X.shape[1]), -50.0) for _ in range(member.shape[1])]
    for at, coef, intercept in zip(model.classes_, model.coef_, model.intercept_, strict=True):
        heads[at] = LinearHead(coef, float(intercept))
    return heads


def fit_others(X: Any, labels: Array, kinds: Sequence[Kind], seed: int = 0) -> dict[int, LinearHead]:
    """The heads of these two kinds, by their column in `labels` [n, heads]."""
    found = {at: fit_tokens(X, labels[:, at], seed) for at, kind in enumerate(kinds) if kind == "out_tokens"}
    domains = [at for at, kind in enumerate(kinds) if kind == "domain"]
    if domains:
        found |= dict(zip(domains, fit_domains(X, labels[:, domains]), strict=True))
    return found


def values_of(X: Any, heads: dict[int, LinearHead], kinds: Sequence[Kind]) -> dict[int, Array]:
    """Tokens [n], and probabilities [n] of domains, by column."""
    scores = {at: np.asarray(X @ head.coef).ravel() + head.intercept for at, head in heads.items()}
    values = {at: np.exp(np.clip(z, -50, 50)) for at, z in scores.items()}
    domains = [at for at in heads if kinds[at] == "domain"]
    if domains:
        stacked = np.column_stack([scores[at] for at in domains])
        p = np.exp(stacked - stacked.max(1, keepdims=True))
        values |= dict(zip(domains, (p / p.sum(1, keepdims=True)).T, strict=True))
    return values


def kind_rows(names: Sequence[str], kinds: Sequence[Kind], labels: Array, values: dict[int, Array]) -> list[Row]:
    """How good out-of-fold values are, beside the constant's: what does not beat it should be left out."""
    rows: list[Row] = []
    for at, kind in enumerate(kinds):
        if kind != "out_tokens":
            continue
        known = ~np.isnan(labels[:, at])
        y, foretold = np.log(np.maximum(labels[known, at], 1.0)), np.log(values[at][known])
        rows.append(Row(f"probe: {names[at]}", "n", float(known.sum()), unit="labels"))
        rows.append(Row(f"probe: {names[at]}", "log error", float(np.abs(y - foretold).mean()), unit="nats"))
        rows.append(Row(f"constant: {names[at]}", "log error", float(np.abs(y - np.median(y)).mean()), unit="nats"))
    domains = [at for at, kind in enumerate(kinds) if kind == "domain"]
    if domains:
        named = ~np.isnan(labels[:, domains]).any(1)
        truth = labels[named][:, domains].argmax(1)
        guess = np.column_stack([values[at][named] for at in domains]).argmax(1)
        rows.append(Row("probe: domain", "accuracy", float((truth == guess).mean()), unit="share"))
        rows.append(Row("constant: domain", "accuracy", float(np.bincount(truth).max() / len(truth)), unit="share"))
    return rows


def fit_dense(
    X: npt.NDArray[np.floating],
    labels: Array,
    kinds: Sequence[Kind],
    names: Sequence[str],
    estimator: "Fits",
    seed: int = 0,
    groups: npt.NDArray[np.object_] | None = None,
    experts: npt.NDArray[np.object_] | None = None,
) -> tuple[Heads, dict[int, tuple[float, float] | None]]:
    """Heads of every kind over dense features: by `estimator` those that say yes or no, the others by `fit_others`.

    `groups` [n], where given, are recognised, and the former start from their means; `experts` [n] likewise, and the
    former get a probe for each. Also the spreads of heads for tokens, by column.
    """
    binary = [at for at, kind in enumerate(kinds) if kind in ("correct", "needs_reasoning")]
    told = tuple(names[at] for at in binary)
    heads = estimator.fit(X, labels[:, binary], told, groups, experts).heads_ if binary else None
    similarity = heads.similarity if heads is not None else None
    inputs = np.asarray(X, np.float64) if similarity is None else similarity(X)
    weight = np.zeros((len(kinds), inputs.shape[1]), np.float32)
    bias = np.zeros(len(kinds), np.float32)
    calibrators: list[Calibrator] = [Exp()] * len(kinds)
    spreads: dict[int, tuple[float, float] | None] = {}
    if heads is not None:
        weight[binary], bias[binary] = heads.weight, heads.bias
        for at, calibrator in zip(binary, heads.calibrators, strict=True):
            calibrators[at] = calibrator
    if len(binary) < len(kinds):
        mean, std = inputs.mean(0), np.maximum(inputs.std(0), STILL)
        for at, head in fit_others((inputs - mean) / std, labels, kinds, seed).items():
            weight[at] = head.coef / std
            bias[at] = head.intercept - float(mean @ (head.coef / std))
            spreads[at] = head.spread
    recognised = None if heads is None else heads.groups
    if recognised is not None:
        means = np.zeros((len(kinds), len(recognised.names)), np.float32)
        means[binary] = recognised.means
        recognised = replace(recognised, means=means)
    mixed = None if heads is None else heads.experts
    return Heads(tuple(names), weight, bias, tuple(calibrators), similarity, recognised, mixed), spreads


class LinearHeads:
    """Logistic regressions over scaled features, folded into plain weights."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(
        self,
        X: Any,
        y: Any,
        names: tuple[str, ...] | None = None,
        groups: npt.NDArray[np.object_] | None = None,
        experts: npt.NDArray[np.object_] | None = None,
    ) -> Self:
        if groups is not None or experts is not None:
            raise ValueError("linear heads recognise no groups and no experts' kinds: fit with landmarks")
        mean, std = X.mean(0), np.maximum(X.std(0), STILL)
        scaled = (X - mean) / std
        # What rows do not span has no weight in a regularised regression: with few rows it is solved in their span.
        basis = np.linalg.svd(scaled, full_matrices=False)[2].T if len(X) < X.shape[1] else None
        inputs = scaled if basis is None else scaled @ basis
        model = SparseProbeClassifier(Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), seed=self.seed).fit(inputs, y)
        weight = (model.coef_ if basis is None else model.coef_ @ basis.T) / std
        names = names or tuple(f"head{at}" for at in range(len(weight)))
        bias = (model.intercept_ - weight @ mean).astype(np.float32)
        self.heads_ = Heads(names, weight.astype(np.float32), bias, model.calibrators_)
        return self


class Fits(Protocol):
    """An estimator of the probe's shape: `kernel.ProbeClassifier`, or LinearHeads."""

    heads_: Heads

    def fit(
        self,
        X: Any,
        y: Any,
        names: tuple[str, ...] | None = None,
        groups: npt.NDArray[np.object_] | None = None,
        experts: npt.NDArray[np.object_] | None = None,
    ) -> Self: ...
