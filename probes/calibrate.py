"""Scores to probabilities, and how honest the probabilities are. numpy only.

A calibrator is fitted on out-of-fold scores: in-sample scores are too extreme.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ISOTONIC_MIN_LABELS = 1000
"""Below about this many labels isotonic regression overfits (Niculescu-Mizil and Caruana, 2005)."""


class Calibrator(Protocol):
    """A non-decreasing map from score (log-odds) to P(correct)."""

    def __call__(self, scores: Array) -> Array: ...


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)), np.float64)


@dataclass(frozen=True, slots=True)
class Platt:
    """P = sigmoid(slope * score + intercept) (Platt, 1999). Strictly increasing, so it never ties two queries."""

    slope: float
    intercept: float

    def __call__(self, scores: Array) -> Array:
        return sigmoid(self.slope * scores + self.intercept)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Piecewise linear through the knots `x` (rising), `y` (non-decreasing, in [0, 1]); flat outside them."""

    x: Array
    y: Array

    def __call__(self, scores: Array) -> Array:
        return np.asarray(np.interp(scores, self.x, self.y), np.float64)


def fit_platt(scores: Array, labels: Array, max_iter: int = 100) -> Platt:
    """Platt's method by damped Newton steps (Lin, Lin and Weng, 2007).

    `scores` [n] are log-odds, `labels` [n] in {0, 1}. The targets are (N1+1)/(N1+2) and 1/(N0+2) instead of 1 and 0,
    which keeps the fit finite on separable data. A falling relation is refused (slope 0): a head that ranks backwards
    must not look confident.
    """
    positives = float(labels.sum())
    negatives = len(labels) - positives
    targets = np.where(labels > 0.5, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    spread = float(scores.std()) or 1.0
    design = np.column_stack([(scores - scores.mean()) / spread, np.ones(len(scores))])

    def loss(parameters: Array) -> float:
        z = design @ parameters
        return float(np.sum(np.logaddexp(0.0, z) - targets * z))

    theta = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    current = loss(theta)
    for _ in range(max_iter):
        p = sigmoid(design @ theta)
        gradient = design.T @ (p - targets)
        if np.abs(gradient).max() < 1e-9 * len(labels):
            break
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while loss(theta - scale * step) > current and scale > 1e-10:
            scale /= 2
        theta = theta - scale * step
        current = loss(theta)
    if theta[0] <= 0:
        return Platt(0.0, float(np.log((positives + 1) / (negatives + 1))))
    slope = theta[0] / spread
    return Platt(float(slope), float(theta[1] - slope * scores.mean()))


def fit_isotonic(scores: Array, labels: Array) -> Isotonic:
    """Isotonic regression by pooling adjacent violators; knots stand at each block's two ends."""
    order = np.argsort(scores, kind="stable")
    x, inverse = np.unique(scores[order], return_inverse=True)
    weight = np.bincount(inverse).astype(np.float64)
    mean = np.bincount(inverse, labels[order]) / weight
    blocks: list[tuple[float, float, int]] = []  # value, weight, points
    for value, w in zip(mean, weight, strict=True):
        points = 1
        while blocks and blocks[-1][0] >= value:
            v, u, m = blocks.pop()
            value, w, points = (v * u + value * w) / (u + w), u + w, points + m
        blocks.append((float(value), float(w), points))
    last = np.cumsum([points for _, _, points in blocks]) - 1
    first = np.concatenate([[0], last[:-1] + 1])
    values = np.array([value for value, _, _ in blocks])
    knots = np.unique(np.concatenate([first, last]))
    return Isotonic(np.asarray(x[knots], np.float64), np.asarray(values[np.searchsorted(last, knots)], np.float64))


def brier(probabilities: Array, labels: Array) -> float:
    """Mean squared error of the probability: 0 is perfect, the variance of the label is the constant's score."""
    return float(np.mean((probabilities - labels) ** 2))


def ece(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error over bins of equal count: mean |mean probability - share correct|."""
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(float(probabilities[part].mean() - labels[part].mean())) * len(part) for part in parts]
    return sum(gaps) / len(order)
