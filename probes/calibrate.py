"""Scores to probabilities, and how honest the probabilities are. numpy only.

A calibrator is fitted on out-of-fold scores: in-sample scores are too extreme. Which one, the number of labels says
(`fit_calibrator`); what each costs is in docs/experiments.md.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
PLATT_MIN_LABELS = 300
"""Below this many labels a temperature alone has the lower log loss: an intercept is noise."""
ISOTONIC_MIN_LABELS = 3000
"""Below this many labels isotonic regression overfits and Platt's method has the lower log loss."""
BINS = 15


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


@dataclass(frozen=True, slots=True)
class Exp:
    """exp(score): of heads for tokens, and of those for domains before they are made to sum to one."""

    def __call__(self, scores: Array) -> Array:
        return np.exp(np.clip(scores, -50, 50))


def fit_platt(scores: Array, labels: Array, max_iter: int = 100) -> Platt:
    """Platt's method by damped Newton steps (Lin, Lin and Weng, 2007).

    `scores` [n] are log-odds, `labels` [n] in {0, 1}. The targets are (N1+1)/(N1+2) and 1/(N0+2) instead of 1 and 0,
    which keeps the fit finite on separable data. A falling relation is refused (slope 0): a head that ranks backwards
    must not look confident.
    """
    positives = float(labels.sum())
    negatives, targets = len(labels) - positives, _smoothed(labels)
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
        return _base_rate(labels)
    slope = theta[0] / spread
    return Platt(float(slope), float(theta[1] - slope * scores.mean()))


def fit_temperature(scores: Array, labels: Array, max_iter: int = 100) -> Platt:
    """A slope alone (Guo et al., arXiv 1706.04599): P = sigmoid(slope * score), with Platt's targets.

    Right for log-odds whose zero is meant, as a logistic regression's are. A falling relation is refused as by Platt's.
    """
    targets = _smoothed(labels)
    scale = float(np.abs(scores).mean())
    if scale < 1e-100:
        return _base_rate(labels)
    z, slope = scores / scale, 0.0
    for _ in range(max_iter):
        p = sigmoid(slope * z)
        # The curvature vanishes far out; its floor and the bound keep Newton's steps where the loss is convex enough.
        step = float(np.sum(z * (p - targets)) / (np.sum(z * z * p * (1 - p)) + 1e-12))
        slope -= min(1.0, max(-1.0, step))
        if abs(step) < 1e-10:
            break
    return Platt(slope / scale, 0.0) if slope > 0 else _base_rate(labels)


def fit_calibrator(scores: Array, labels: Array) -> Platt | Isotonic:
    """A temperature below 300 labels, Platt's method below 3,000, isotonic regression from there on."""
    if len(labels) < PLATT_MIN_LABELS:
        return fit_temperature(scores, labels)
    return fit_platt(scores, labels) if len(labels) < ISOTONIC_MIN_LABELS else fit_isotonic(scores, labels)


def _base_rate(labels: Array) -> Platt:
    """The same probability for all: the smoothed share of ones."""
    positives = float(labels.sum())
    return Platt(0.0, float(np.log((positives + 1) / (len(labels) - positives + 1))))


def _smoothed(labels: Array) -> Array:
    """Platt's targets: what one more label of each class would leave of 0 and 1."""
    positives = float(labels.sum())
    return np.where(labels > 0.5, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))


def fit_isotonic(scores: Array, labels: Array) -> Isotonic:
    """Centred isotonic regression (Oron and Flournoy, 2017): adjacent violators pooled, one knot at a block's mean.

    It rises everywhere between the first and the last knot, where plain isotonic regression ties whole blocks of
    queries, and it stays a label's weight away from 0 and 1.
    """
    order = np.argsort(scores, kind="stable")
    x, inverse = np.unique(scores[order], return_inverse=True)
    weight = np.bincount(inverse).astype(np.float64)
    mean = np.bincount(inverse, labels[order]) / weight
    blocks: list[tuple[float, float, float]] = []  # value, weight, centre
    for value, w, centre in zip(mean, weight, x, strict=True):
        while blocks and blocks[-1][0] >= value:
            v, u, c = blocks.pop()
            value, w, centre = (v * u + value * w) / (u + w), u + w, (c * u + centre * w) / (u + w)
        blocks.append((float(value), float(w), float(centre)))
    values = np.array([value for value, _, _ in blocks])
    least = 1 / (len(labels) + 2)
    return Isotonic(np.array([centre for _, _, centre in blocks]), np.clip(values, least, 1 - least))


def fit_linear(scores: Array, labels: Array) -> Isotonic:
    """The least-squares line, cut at the ends of [0, 1]: of scores that are expected values, up to scale and shift.

    For labels anywhere in [0, 1]. A line keeps the order of two heads whose scores are near, which steps of their own
    would not. A falling relation is refused: the constant.
    """
    base, spread = float(labels.mean()), float(scores.var())
    slope = float(((scores - scores.mean()) * (labels - base)).mean()) / spread if spread else 0.0
    if slope <= 0:
        return Isotonic(np.array([0.0]), np.array([base]))
    middle = float(scores.mean())
    return Isotonic(np.array([middle - base / slope, middle + (1 - base) / slope]), np.array([0.0, 1.0]))


def brier(probabilities: Array, labels: Array) -> float:
    """Mean squared error of the probability: 0 is perfect, the variance of the label is the constant's score."""
    return float(np.mean((probabilities - labels) ** 2))


@dataclass(frozen=True, slots=True)
class Bin:
    """A row of the reliability table: queries of similar probability."""

    n: int
    low: float
    high: float
    """Least and greatest probability in it."""
    mean: float
    share: float
    """Of correct answers."""
    share_low: float
    share_high: float
    """Wilson's 95% interval of the share."""


def reliability(probabilities: Array, labels: Array, bins: int = BINS) -> list[Bin]:
    """Bins of equal count, from the least probability to the greatest; equal probabilities stay in one bin."""
    order = np.argsort(probabilities, kind="stable")
    p, y = probabilities[order], labels[order]
    cuts = [len(part) for part in np.array_split(order, bins)]
    ends = np.unique(np.searchsorted(p, p[np.cumsum([cut for cut in cuts if cut]) - 1], side="right"))
    found = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        n, share = int(end - start), float(y[start:end].mean())
        middle, reach = _wilson(share, n)
        mean = float(p[start:end].mean())
        found.append(Bin(n, float(p[start]), float(p[end - 1]), mean, share, middle - reach, middle + reach))
    return found


def _wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """(middle, half width) of the score interval of a share (Wilson, 1927)."""
    weight = 1 / (1 + z * z / n)
    reach = weight * z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return weight * (share + z * z / (2 * n)), reach


BAND_ROWS = 50
"""Fewer than this tell little of a share."""
MAX_BANDS = 20


def bands(probabilities: Array, labels: Array) -> tuple[tuple[float, float, float], ...]:
    """(up to this probability, low, high), as `HeadInfo.bands` keeps them, of rows that have both; bins of equal count,
    rows of one probability in one bin. Empty for too few rows."""
    known = ~(np.isnan(probabilities) | np.isnan(labels))
    p, y = probabilities[known], labels[known]
    count = min(MAX_BANDS, len(p) // BAND_ROWS)
    if count == 0:
        return ()
    found = reliability(p, y, count)
    ends = [*(one.high for one in found[:-1]), 1.0]
    return tuple((end, max(0.0, one.share_low), min(1.0, one.share_high)) for end, one in zip(ends, found, strict=True))


def ece(probabilities: Array, labels: Array, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal count: mean |mean probability - share correct|."""
    found = reliability(probabilities, labels, bins)
    return sum(one.n * abs(one.mean - one.share) for one in found) / len(labels)
