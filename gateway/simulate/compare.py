"""Routers of one table side by side, with paired bootstrap intervals: every draw takes the same queries for all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.simulate.routed import Routed
from gateway.simulate.table import Array
from probes.evaluate import Row, interval

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """One router with 95% intervals. Costs: US dollars per 1,000 queries. A saving: a share of the other's."""

    name: str
    accuracy: tuple[float, float, float]
    """(value, low, high)."""
    cost: tuple[float, float, float] | None
    share: dict[str, float]
    gain: tuple[float, float, float] | None
    """The policy's accuracy less this one's; None for the policy itself."""
    saving: tuple[float, float, float] | None
    """The share of this one's cost that the policy saves; None where nothing is spent or known."""

    def to_json(self) -> dict[str, Any]:
        def spread(found: tuple[float, float, float] | None) -> dict[str, float] | None:
            return None if found is None else dict(zip(("value", "low", "high"), found, strict=True))

        return {
            "name": self.name,
            "accuracy": spread(self.accuracy),
            "cost_usd_per_1000": spread(self.cost),
            "share": self.share,
            "policy_accuracy_gain": spread(self.gain),
            "policy_cost_saving": spread(self.saving),
        }

    def rows(self) -> Iterator[Row]:
        """As rows of the tables that `leadline probe` prints."""
        yield Row(self.name, "accuracy", *self.accuracy, unit="share")
        if self.cost is not None:
            yield Row(self.name, "cost", *self.cost, unit="$ per 1,000")


def compare(policy: Routed, others: Sequence[Routed], models: Sequence[str], *, seed: int = 0) -> list[Measured]:
    """The policy first, then the others, on `DRAWS` resamples of the queries."""
    routers = [policy, *others]
    n = len(policy.accuracy)
    draws = _means(np.stack([router.accuracy for router in routers], axis=1), n, seed)
    paid = None
    if policy.cost is not None:
        paid = _means(np.stack([_cost(router) for router in routers], axis=1), n, seed) * 1e-6  # nano-$ → $ per 1,000
    found = []
    for index, router in enumerate(routers):
        accuracy = float(router.accuracy.mean())
        cost = gain = saving = None
        if paid is not None:
            value = float(_cost(router).mean()) * 1e-6
            cost = (value, *interval(list(paid[:, index])))
            ours = float(_cost(policy).mean()) * 1e-6
            if index and value > 0:
                with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold nothing that costs
                    ratio = 1.0 - paid[:, 0] / paid[:, index]
                saving = (1.0 - ours / value, *interval(list(np.where(np.isfinite(ratio), ratio, np.nan))))
        if index:
            gain = (float(policy.accuracy.mean()) - accuracy, *interval(list(draws[:, 0] - draws[:, index])))
        found.append(
            Measured(
                router.name,
                (accuracy, *interval(list(draws[:, index]))),
                cost,
                dict(zip(models, map(float, router.share), strict=True)),
                gain,
                saving,
            )
        )
    return found


def _cost(router: Routed) -> Array:
    assert router.cost is not None
    return router.cost


def _means(values: Array, n: int, seed: int) -> Array:
    """[DRAWS, routers] means over resampled rows of `values` [n, routers]; the same seed draws the same rows."""
    rng = np.random.default_rng(seed)
    weights = np.full(n, 1.0 / n)
    return np.stack([rng.multinomial(n, weights) @ values for _ in range(DRAWS)]) / n
