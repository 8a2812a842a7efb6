"""What a fitted probe is at inference: similarities to a few hundred prompts it has seen, weighed, and calibrated.

numpy only, so it loads at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array, Calibrator


@dataclass(frozen=True, slots=True)
class Similarity:
    """exp(-gamma |z - landmark|^2), z = (features - mean) / scale @ basis: near 0 for what resembles nothing seen."""

    mean: Array
    """[features]"""
    scale: Array
    """[features]"""
    basis: Array
    """[features, components]"""
    landmarks: Array
    """[landmarks, components]"""
    gamma: float

    def __call__(self, features: npt.NDArray[np.floating]) -> Array:
        """[n, landmarks]"""
        return rbf(self.project(features), self.landmarks, self.gamma)

    def project(self, features: npt.NDArray[np.floating]) -> Array:
        """z [n, components]"""
        return np.asarray((np.asarray(features, np.float64) - self.mean) / self.scale @ self.basis, np.float64)


def rbf(a: Array, b: Array, gamma: float) -> Array:
    """The Gaussian kernel between the rows of a [n, d] and of b [m, d]: [n, m]."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2.0 * (a @ b.T)
    return np.asarray(np.exp(-gamma * np.maximum(squared, 0.0)), np.float64)


def softmax(scores: Array) -> Array:
    """Each row [n, d] made positive, with sum 1."""
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True), np.float64)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups that are recognised, and what belonging to one adds to each head's score."""

    names: tuple[str, ...]
    weight: npt.NDArray[np.float32]
    """[groups, landmarks]"""
    bias: npt.NDArray[np.float32]
    """[groups]"""
    means: npt.NDArray[np.float32]
    """[heads, groups]"""

    def __call__(self, inputs: Array) -> Array:
        """What is added to the scores [n, heads]."""
        p = softmax(inputs @ self.weight.T.astype(np.float64) + self.bias)
        return np.asarray(p @ self.means.T.astype(np.float64), np.float64)


NEGLIGIBLE = 1e-3
"""An expert whose share is not above this is not asked: it could move no probability further."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Kinds of prompts, recognised, each with a probe of its own: a mixture of experts (Jacobs et al., 1991)."""

    kinds: tuple[str, ...]
    weight: npt.NDArray[np.float32]
    """[kinds, landmarks]"""
    bias: npt.NDArray[np.float32]
    """[kinds]"""
    own: "tuple[Heads | None, ...]"
    """Each kind's probe, of some heads or all; of the others, and where it is None, the probe of all prompts speaks."""

    def __call__(self, p: Array, names: Sequence[str], inputs: Array, features: npt.NDArray[np.floating]) -> Array:
        """What the probe of all prompts says [n, heads], and what the experts say, each as far as a prompt is its."""
        share = softmax(inputs @ self.weight.T.astype(np.float64) + self.bias)
        mixed = p.copy()
        for at, expert in enumerate(self.own):
            rows = np.flatnonzero(share[:, at] > NEGLIGIBLE)
            if expert is not None and len(rows):
                place = np.ix_(rows, np.array([names.index(name) for name in expert.names]))
                mixed[place] += share[rows, at, None] * (expert.predict_proba(features[rows]) - p[place])
        return mixed


@dataclass(frozen=True, slots=True)
class Heads:
    """Calibrated heads, linear in the features or, where there is a `similarity`, in the similarities to landmarks.

    A head of a similarity says its base rate of a prompt that is like none of the landmarks; with `groups`, about the
    mean of its values in them; with `experts`, the base rate of the kind that is the most common.
    """

    names: tuple[str, ...]
    weight: npt.NDArray[np.float32]
    """[heads, features], or [heads, landmarks]"""
    bias: npt.NDArray[np.float32]
    """[heads]"""
    calibrators: tuple[Calibrator, ...]
    similarity: Similarity | None = None
    groups: Groups | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        heads = len(self.names)
        if self.weight.ndim != 2 or self.weight.shape[0] != heads or self.bias.shape != (heads,):
            raise ValueError(f"{heads} heads do not fit weight {self.weight.shape} and bias {self.bias.shape}")
        if len(self.calibrators) != heads:
            raise ValueError(f"{heads} heads but {len(self.calibrators)} calibrators")
        if self.similarity is not None and len(self.similarity.landmarks) != self.weight.shape[1]:
            raise ValueError(f"{len(self.similarity.landmarks)} landmarks do not fit weight {self.weight.shape}")
        if (known := self.groups) is not None:
            shapes = (len(known.names), self.weight.shape[1]), (len(known.names),), (heads, len(known.names))
            if (known.weight.shape, known.bias.shape, known.means.shape) != shapes:
                raise ValueError(f"{len(known.names)} groups do not fit {heads} heads and weight {self.weight.shape}")
        if (mixed := self.experts) is not None:
            n = len(mixed.kinds)
            if (len(mixed.own), mixed.weight.shape, mixed.bias.shape) != (n, (n, self.weight.shape[1]), (n,)):
                raise ValueError(f"{n} kinds do not fit {len(mixed.own)} experts and weight {mixed.weight.shape}")
            if unknown := {name for one in mixed.own if one is not None for name in one.names} - set(self.names):
                raise ValueError(f"experts have heads {sorted(unknown)}, which the probe has not")

    def decision_function(self, features: npt.NDArray[np.floating]) -> Array:
        """Uncalibrated log-odds [n, heads] of features [n, features], experts unheard."""
        return self._scores(self._inputs(features))

    def predict_proba(self, features: npt.NDArray[np.floating]) -> Array:
        """Calibrated P(correct) [n, heads]."""
        inputs = self._inputs(features)
        scores = self._scores(inputs)
        columns: Sequence[Array] = [calibrate(scores[:, i]) for i, calibrate in enumerate(self.calibrators)]
        p = np.column_stack(columns)
        return p if self.experts is None else self.experts(p, self.names, inputs, features)

    def _inputs(self, features: npt.NDArray[np.floating]) -> Array:
        return np.asarray(features, np.float64) if self.similarity is None else self.similarity(features)

    def _scores(self, inputs: Array) -> Array:
        scores = np.asarray(inputs @ self.weight.T.astype(np.float64) + self.bias, np.float64)
        return scores if self.groups is None else scores + self.groups(inputs)
