"""The value of a policy that was not run, from the logs of one that was (off-policy evaluation). numpy alone.

Doubly robust (Dudík, Langford, Li, 2011): a model of the outcome by context and action, fitted out of fold, plus the
logged residual weighted by π(a|x) / propensity. It is unbiased if the propensities are right, whatever the model is;
the model takes variance away. Intervals are normal, on the mean of the rows' own terms.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
CLIP = 50.0
"""Largest weight of one row. What was cut is reported: it is a bias towards the outcome model."""
FOLDS = 5
RIDGE = 1.0
MIN_ROWS = 30
"""Fewer rows have no interval worth the name."""
ROUGH = 150
"""With weights worth fewer rows, a 95% interval holds the truth less often than that: 90% at 55 of them, measured on
answers that are right or wrong; 93% at 135, 95% at 270."""


@dataclass(frozen=True, slots=True)
class Logged:
    """n decisions among m actions, all of which the logging policy could have taken there with the propensity it said,
    or the one that it took for sure."""

    action: npt.NDArray[np.intp]
    """[n], as taken."""
    propensity: Array
    """[n], of the action taken; in (0, 1]."""
    outcome: Array
    """[n], of the action taken; NaN: not known."""
    features: Array
    """[n, m, d] of each action in each context, for the model of the outcome."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, terms: Array) -> "Estimate":
        mean = float(terms.mean())
        error = 1.959964 * float(terms.std(ddof=1)) / len(terms) ** 0.5
        return cls(mean, mean - error, mean + error)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The logged policy beside the new one, on the same rows."""

    n: int
    before: Estimate
    after: Estimate
    change: Estimate
    effective_n: float
    """Rows that a sample without weights would need for the same: (sum w)² / sum w²."""
    largest_weight: float
    clipped: float
    """Share of rows whose weight was cut to CLIP."""

    @property
    def rough(self) -> bool:
        """The interval is too narrow for what it says."""
        return self.effective_n < ROUGH


def doubly_robust(logged: Logged, target: Array, *, seed: int = 0) -> Evaluation | None:
    """`target` [n, m]: the new policy's probabilities. None where fewer than MIN_ROWS outcomes are known."""
    known = ~np.isnan(logged.outcome)
    if known.sum() < MIN_ROWS:
        return None
    rows = np.flatnonzero(known)
    action, outcome, features = logged.action[rows], logged.outcome[rows], logged.features[rows]
    expected = outcome_model(action, outcome, features, seed=seed)
    raw, weights = _weights(logged, target, rows)
    taken = expected[np.arange(len(rows)), action]
    terms = (target[rows] * expected).sum(1) + weights * (outcome - taken)
    return Evaluation(
        n=len(rows),
        before=Estimate.of(outcome),
        after=Estimate.of(terms),
        change=Estimate.of(terms - outcome),
        effective_n=float(weights.sum() ** 2 / max(float((weights**2).sum()), 1e-300)),
        largest_weight=float(raw.max()),
        clipped=float((raw > CLIP).mean()),
    )


def _weights(logged: Logged, target: Array, rows: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """(as they are, cut to CLIP), of the actions taken."""
    raw = target[rows, logged.action[rows]] / logged.propensity[rows]
    return raw, np.minimum(raw, CLIP)


def outcome_model(action: npt.NDArray[np.intp], outcome: Array, features: Array, *, seed: int = 0) -> Array:
    """[n, m] expected outcomes, out of fold: a ridge regression by action; of a rare action the one of all."""
    n, m, d = features.shape
    fold = np.random.default_rng(seed).permutation(n) % FOLDS
    out = np.zeros((n, m))
    low, high = float(outcome.min()), float(outcome.max())
    own = features[np.arange(n), action]
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        scale = np.maximum(np.abs(own[train]).max(0), 1e-12)
        common = _ridge(own[train] / scale, outcome[train])
        for a in range(m):
            chosen = train & (action == a)
            enough = chosen.sum() >= 4 * d
            weights = _ridge(own[chosen] / scale, outcome[chosen]) if enough else common
            out[test, a] = np.clip(features[test, a] / scale @ weights, low, high)
    return out


def _ridge(x: Array, y: Array) -> Array:
    """The first feature is the constant one, and is not shrunk."""
    shrink = RIDGE * np.eye(x.shape[1])
    shrink[0, 0] = 1e-9
    return np.asarray(np.linalg.solve(x.T @ x + shrink, x.T @ y))
