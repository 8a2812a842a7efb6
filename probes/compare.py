"""Several artifacts on the same rows, side by side: every difference from the first with a paired 95% interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from probes.calibrate import Array, brier, ece
from probes.certify import choose, to_last
from probes.evaluate import Statistic, apgr, auc, cpt50, cpt80, interval, resamples
from probes.manifest import Certificate
from probes.table import Table

Measure = Callable[[np.ndarray], float]
"""Of some rows of the table, by their numbers."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One measure of every artifact. Intervals of the differences are of the same resamples for both."""

    measure: str
    values: tuple[float, ...]
    differences: tuple[tuple[float, float, float], ...]
    """(value, low, high) of each artifact but the first, minus the first."""
    better: str
    """`higher`, `lower`, or empty where neither is."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def compare(
    table: Table,
    probes: Mapping[str, Array],
    certificates: Sequence[Certificate | None] = (),
    *,
    times: int = 1000,
    seed: int = 0,
) -> list[Compared]:
    """Probabilities [n, heads] of each artifact on this table. `certificates`, one an artifact, if all have one for
    routing between `weak` and `strong`: what each loses and keeps by its own threshold.

    Of a head, the rows of which all of them say something; of routing, all rows: who says nothing keeps them at strong.
    """
    ps = list(probes.values())
    found = []
    for i, name in enumerate(table.names):
        known = np.flatnonzero(~np.isnan(np.column_stack([table.labels[:, i], *(p[:, i] for p in ps)])).any(1))
        y = table.labels[known, i]
        if not len(y):
            continue
        for measure, of, better in (("Brier", brier, "lower"), ("ECE", ece, "lower"), ("AUC", auc, "higher")):
            mine = [_on(of, p[known, i], y) for p in ps]
            found.append(_compared(f"{name}: {measure}", mine, len(known), better, times, seed))
    if not {"weak", "strong"} <= set(table.names):
        return found
    columns = [table.names.index("weak"), table.names.index("strong")]
    both = np.flatnonzero(~np.isnan(table.labels[:, columns]).any(1))
    weak, strong = table.labels[both][:, columns].T
    pairs = [to_last(p[both][:, columns]) for p in ps]
    for measure, curve, better in (("APGR", apgr, "higher"), ("CPT50", cpt50, "lower"), ("CPT80", cpt80, "lower")):
        mine = [_between(curve, pair[:, 1] - pair[:, 0], weak, strong) for pair in pairs]
        found.append(_compared(measure, mine, len(both), better, times, seed))
    if certificates and all(one is not None for one in certificates):
        kept = [choose(p, one.threshold) == 0 for p, one in zip(pairs, certificates, strict=True) if one is not None]
        alpha = max(one.alpha for one in certificates if one is not None)
        lost = [k & (strong > weak) for k in kept]
        title = f"loss by certificate ({alpha:.0%})"
        found.append(_compared(title, [_mean(one) for one in lost], len(both), "", times, seed))
        found.append(_compared("kept by it at weak", [_mean(one) for one in kept], len(both), "higher", times, seed))
    return found


def _on(measure: Callable[[Array, Array], float], p: Array, y: Array) -> Measure:
    return lambda rows: measure(p[rows], y[rows])


def _between(curve: Statistic, scores: Array, weak: Array, strong: Array) -> Measure:
    return lambda rows: curve(scores[rows], weak[rows], strong[rows])


def _mean(values: np.ndarray) -> Measure:
    return lambda rows: float(values[rows].mean())


def _compared(name: str, of: Sequence[Measure], n: int, better: str, times: int, seed: int) -> Compared:
    every = np.arange(n)
    values = tuple(measure(every) for measure in of)
    draws = np.array([[measure(rows) for measure in of] for rows in resamples(n, times if len(of) > 1 else 0, seed)])
    differences = tuple((values[i] - values[0], *interval(list(draws[:, i] - draws[:, 0]))) for i in range(1, len(of)))
    return Compared(name, values, differences, better)
