"""Fitting the experts of a probe: of each kind of prompts that has labels enough, a probe that has seen no other kind.

One regression for kinds that are unlike finds the directions in which they differ, and misses those that matter within
the smaller ones. Which kind a prompt is of, is recognised as groups are; a prompt of no kind that was seen is left to
the probe of the most common one, which then says its base rate.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array
from probes.groups import Recognised
from probes.heads import Experts, Heads

MIN_LABELS = 300
"""Fewer labels of one kind make no expert: the probe of all prompts knows more."""
MIN_OF_CLASS = 30
"""Nor do fewer labels of the rarer class."""

Fit = Callable[[Array, Array, tuple[str, ...]], Heads]


def fit_experts(
    X: Array,
    labels: Array,
    kinds: npt.NDArray[np.object_],
    names: Sequence[str],
    recognised: Recognised,
    root: Array,
    fit: Fit,
) -> Experts | None:
    """`X` [n, features], `labels` [n, heads] with NaN where there is none, `kinds` [n], recognised by `recognised` from
    the landmarks that `root` makes orthogonal; `fit` gives the heads of rows and columns. None: no kind has enough.
    """
    own: list[Heads | None] = []
    for kind in recognised.names:
        rows = np.flatnonzero(kinds.astype(str) == kind)
        columns = np.flatnonzero([_enough(column) for column in labels[rows].T])
        chosen = labels[np.ix_(rows, columns)]
        known = np.flatnonzero(~np.isnan(chosen).all(1))
        own.append(
            fit(X[rows[known]], chosen[known], tuple(names[at] for at in columns.tolist())) if len(columns) else None
        )
    if not any(own):
        return None
    weight = (root @ recognised.weight).T
    return Experts(
        recognised.names, weight.astype(np.float32, order="C"), recognised.bias.astype(np.float32), tuple(own)
    )


def _enough(labels: Array) -> bool:
    known = labels[~np.isnan(labels)]
    ones = float(known.sum())
    return len(known) >= MIN_LABELS and min(ones, len(known) - ones) >= MIN_OF_CLASS
