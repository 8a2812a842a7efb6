"""The `prefill` and `self` tiers: what a local model's own reading of a prompt says; numpy only.

`prefill` reads hidden states at the last token of the prompt, or their mean over all of its tokens; `self` three
numbers that the model says of itself.
"""

import hashlib
import math
from pathlib import Path
from typing import Final, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact, read
from probes.errors import ArtifactError
from probes.manifest import reading_of
from probes.types import Reading

RATINGS: Final = ("entropy", "p_true", "internal_confidence")
"""The features of tier `self`, probabilities as log-odds."""
QUESTION: Final = "Can this be answered correctly? Yes or No: "
"""What a model is asked about the prompt that it has read; the artifact says what it was fitted with."""
ANSWERS: Final = ("Yes", "No")


class SelfRating(Protocol):
    """What the engine knows of a model's word on itself."""

    @property
    def entropy(self) -> float: ...

    @property
    def p_true(self) -> float | None: ...

    @property
    def internal_confidence(self) -> float | None: ...


def weights_sha256(folder: Path) -> str:
    """Digest of a model's weights: of each safetensors file, in the order of their names. Raises ArtifactError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"no safetensors weights in {folder}: give the folder of the model that the probe hears")
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def rating_features(rating: SelfRating) -> list[float]:
    """In the order of RATINGS; what was not asked counts as even odds."""
    return [rating.entropy, _log_odds(rating.p_true), _log_odds(rating.internal_confidence)]


def _log_odds(p: float | None) -> float:
    p = 0.5 if p is None else min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p) - math.log1p(-p)


class PromptProbe:
    """A fitted probe of one of these two tiers. Satisfies the engine's `PromptReader` without knowing it."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._rates = artifact.manifest.tier == "self"
        self.version = artifact.version
        self.heads = artifact.heads.names
        self.layers: tuple[int, ...] = () if self._rates else artifact.manifest.layers
        self.over: Literal["last", "prompt"] = artifact.manifest.over
        self.question = artifact.manifest.question
        self.answers = artifact.manifest.answers

    @classmethod
    def load(cls, folder: Path | str, model: Path) -> Self:
        """`model`: the folder of the model that it will hear. Raises ArtifactError where it was fitted on another."""
        artifact = read(Path(folder))
        if artifact.manifest.tier not in ("prefill", "self"):
            raise ArtifactError(f"{folder} is a probe of tier `{artifact.manifest.tier}`; it hears no model read")
        artifact.require_encoder(model.name, weights_sha256(model))
        return cls(artifact)

    def read(self, states: npt.NDArray[np.float32], rating: SelfRating) -> Reading:
        """`states`: [layers, width] at the last token of the prompt, or their mean over it: see `over`."""
        features = np.array([rating_features(rating)], np.float32) if self._rates else states.reshape(1, -1)
        return reading_of(self._artifact.manifest.heads, self._artifact.heads.predict_proba(features)[0].tolist())
