"""What a fitted probe is at inference: one linear map and one calibrator per head. numpy only, so it loads at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array, Calibrator


@dataclass(frozen=True, slots=True)
class Heads:
    """Calibrated linear heads over one feature vector; scaling and PCA are folded into `weight`."""

    names: tuple[str, ...]
    weight: npt.NDArray[np.float32]
    """[heads, features]"""
    bias: npt.NDArray[np.float32]
    """[heads]"""
    calibrators: tuple[Calibrator, ...]

    def __post_init__(self) -> None:
        heads = len(self.names)
        if self.weight.ndim != 2 or self.weight.shape[0] != heads or self.bias.shape != (heads,):
            raise ValueError(f"{heads} heads do not fit weight {self.weight.shape} and bias {self.bias.shape}")
        if len(self.calibrators) != heads:
            raise ValueError(f"{heads} heads but {len(self.calibrators)} calibrators")

    def decision_function(self, features: npt.NDArray[np.floating]) -> Array:
        """Uncalibrated log-odds [n, heads] of features [n, features]."""
        return np.asarray(features, np.float64) @ self.weight.T.astype(np.float64) + self.bias

    def predict_proba(self, features: npt.NDArray[np.floating]) -> Array:
        """Calibrated P(correct) [n, heads]."""
        scores = self.decision_function(features)
        columns: Sequence[Array] = [calibrate(scores[:, i]) for i, calibrate in enumerate(self.calibrators)]
        return np.column_stack(columns)
