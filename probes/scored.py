"""What a fitted artifact says of a table, read with whatever its tier reads."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.calibrate import Array
from probes.extract import Encoder
from probes.listen import ListenedModel
from probes.train import Table, score, score_features


def scored(table: Table, artifact: Artifact, source: str = "default", *, progress: bool = False) -> Array:
    """Probabilities [n, heads of the table]. `source` is the encoder's; of tiers prefill and self the local model's,
    where `default` is the one that the artifact names. Raises ArtifactError, EncoderError, TableError.
    """
    if artifact.manifest.tier not in ("prefill", "self"):
        return score(table, artifact, Encoder.load(source), progress)
    return score_features(table, artifact, listened(artifact, heard_by(artifact, source), table.prompts, progress))


def heard_by(artifact: Artifact, source: str) -> ListenedModel:
    """The local model that an artifact of tier prefill or self was fitted on. Raises ArtifactError, EncoderError."""
    heard = ListenedModel.load(artifact.manifest.encoder if source == "default" else source)
    artifact.require_encoder(heard.name, heard.sha256)
    return heard


def listened(
    artifact: Artifact, heard: ListenedModel, prompts: Sequence[str], progress: bool = False
) -> npt.NDArray[np.float32]:
    """[n, …]: what the artifact's heads read of these prompts."""
    if artifact.manifest.tier == "self":
        return heard.ratings(prompts, progress=progress)
    return heard.states(prompts, artifact.manifest.layers, progress)
