"""Groups of prompts that are recognised, and what each head is worth in them: the coarse part of a probe.

Where prompts come from a few kinds of tasks, most of what tells models apart is the task, and a regression that must
find it again for every prompt is noisier than a table. A task is recognised from the prompt alone; the table is weighed
by how sure that is, and the regression has the rest to foretell.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from probes.calibrate import Array
from probes.heads import softmax
from probes.ridge import ridge

SHRINK = 3.0
"""Rows of the overall mean that are counted with those of each group."""
SHARPEST = 60.0
"""Bound of the factor that makes a regression's scores log-odds."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """P(group) = softmax(inputs @ weight + bias); a head's value in a group is `means`."""

    names: tuple[str, ...]
    weight: Array
    """[inputs, groups]"""
    bias: Array
    """[groups]"""
    means: Array
    """[heads, groups]"""
    own: Array
    """[n, heads], mean of each training row's own group without the row"""
    looked_up: Array
    """[n, heads], what is foretold of each training row, its group recognised without its help"""


def recognise(
    inputs: Array, groups: npt.NDArray[np.object_], labels: Array, strengths: tuple[float, ...]
) -> Recognised:
    """`inputs` [n, d], `groups` [n] names, `labels` [n, heads] with NaN where there is none.

    Groups are told apart by a ridge regression of membership, whose left-out scores also set how sharp its word is.
    """
    names, member = np.unique(groups.astype(str), return_inverse=True)
    rows = np.arange(len(member))
    found = ridge(inputs, np.eye(len(names))[member], strengths)

    def surprise(sharpness: float) -> float:
        return -float(np.log(softmax(sharpness * found.left_out)[rows, member] + 1e-12).mean())

    sharpness = float(minimize_scalar(surprise, bounds=(0.0, SHARPEST), method="bounded").x)
    p = softmax(sharpness * found.left_out)
    known = ~np.isnan(labels)
    base = np.nanmean(labels, 0)
    sums, counts = (np.zeros((len(names), labels.shape[1])) for _ in range(2))
    np.add.at(sums, member, np.where(known, labels, 0.0))
    np.add.at(counts, member, known)
    means = (sums + SHRINK * base) / (counts + SHRINK)
    others = counts[member] - known
    own = (sums[member] - np.where(known, labels, 0.0) + SHRINK * base) / (others + SHRINK)
    looked_up = p @ means + p[rows, member][:, None] * (own - means[member])
    return Recognised(tuple(map(str, names)), sharpness * found.weight, sharpness * found.bias, means.T, own, looked_up)
