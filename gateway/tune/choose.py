"""From what plans did on the same questions to the one that each preference takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.tune.preferences import ALLOWED_LOSS, Preference

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """What one plan did. Intervals are of 95%, paired: over resamples of the same questions."""

    name: str
    accuracy: tuple[float, float, float]
    gain: tuple[float, float, float]
    """Accuracy above that of the model without a plan."""
    tokens: float
    """Computed per question, by all models: read, written, thrown away."""
    cost: tuple[float, float, float]
    """Per question, as a share of what it is without a plan."""


def measured(
    right: Mapping[str, Sequence[bool]], tokens: Mapping[str, float], cost: Mapping[str, Any]
) -> list[Measured]:
    """By plan, the one without first: right and cost per question, in the same order; tokens in all."""
    first = next(iter(right))
    base, spent = np.array(right[first], np.float64), np.array(cost[first], np.float64)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(base), (_RESAMPLES, len(base)))
    found = []
    for name, outcomes in right.items():
        good, paid = np.array(outcomes, np.float64), np.array(cost[name], np.float64)
        found.append(
            Measured(
                name,
                _interval(good.mean(), good[draws].mean(1)),
                _interval((good - base).mean(), (good - base)[draws].mean(1)),
                tokens[name] / len(base),
                _interval(paid.sum() / spent.sum(), paid[draws].sum(1) / spent[draws].sum(1)),
            )
        )
    return found


def choose(plans: Sequence[Measured], preference: Preference) -> Measured:
    """The cheapest plan whose accuracy is at most so much below the best: that of the model without a plan, or of a
    plan that is better for certain (the best of many by chance is no better)."""
    best = max([plans[0].accuracy[0], *(plan.accuracy[0] for plan in plans if plan.gain[1] > 0)])
    near = [plan for plan in plans if plan.accuracy[0] >= best - ALLOWED_LOSS[preference] - 1e-9]
    return min(near, key=lambda plan: plan.cost[0])


def _interval(value: float, draws: Any) -> tuple[float, float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(value), float(low), float(high)
