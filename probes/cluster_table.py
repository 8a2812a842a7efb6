"""A fitted table of clusters: what is known of queries that lie together, model by model. numpy only.

Made by `probes.clusters`; in an artifact it stands where others have weights.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array


@dataclass(frozen=True, slots=True)
class ClusterTable:
    """What is known of each cluster."""

    names: tuple[str, ...]
    """The heads, one per model."""
    centres: npt.NDArray[np.float32]
    """[clusters, features], of length one each."""
    rates: npt.NDArray[np.float32]
    """[clusters, heads]"""
    nearest: int
    beta: float

    def weights(self, features: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int64], Array]:
        """The nearest clusters of each query and their weights, both [n, nearest]; nearest first, of sum 1."""
        distance = 1 - unit(np.asarray(features, np.float64)) @ self.centres.T.astype(np.float64)
        order = np.argsort(distance, axis=1, kind="stable")[:, : self.nearest]
        near = np.take_along_axis(distance, order, axis=1)
        weight = np.exp(-self.beta * (near - near[:, :1]))
        return order, weight / weight.sum(axis=1, keepdims=True)

    def predict_proba(self, features: npt.NDArray[np.floating]) -> Array:
        """P(correct) [n, heads]."""
        order, weight = self.weights(features)
        return np.asarray(np.einsum("nk,nkh->nh", weight, self.rates.astype(np.float64)[order]))


def unit(points: Array) -> Array:
    """Each row divided by its length; one of length zero stays."""
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(length > 0, length, 1))
