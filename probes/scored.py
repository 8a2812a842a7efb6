"""What a fitted artifact says of a table, read with whatever its tier reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact, read
from probes.calibrate import Array
from probes.extract import Encoder
from probes.listen import ListenedModel
from probes.manifest import read_manifest
from probes.static import StaticProbe
from probes.table import Table
from probes.train import require_heads, score, score_features

AnyProbe = Artifact | StaticProbe


def opened(folder: Path) -> AnyProbe:
    """The artifact in `folder`, of any tier. Raises ArtifactError."""
    return StaticProbe.load(folder) if read_manifest(folder).tier == "static" else read(folder)


def scored(table: Table, probe: AnyProbe, source: str = "default", *, progress: bool = False) -> Array:
    """Probabilities [n, heads of the table], NaN where a static probe abstains. `source` is the encoder's; of tiers
    prefill and self the local model's, where `default` is the one that the artifact names. Raises ArtifactError,
    EncoderError, TableError.
    """
    if isinstance(probe, StaticProbe):
        return _by_words(table, probe, progress)
    if probe.manifest.tier not in ("prefill", "self"):
        return score(table, probe, Encoder.load(source), progress)
    return score_features(table, probe, listened(probe, heard_by(probe, source), table.prompts, progress))


def _by_words(table: Table, probe: StaticProbe, progress: bool) -> Array:
    from tqdm import tqdm

    require_heads(table, probe.version, probe.heads)
    found = np.full((len(table.prompts), len(table.names)), np.nan)
    for row, prompt in enumerate(tqdm(table.prompts, desc=probe.version, unit="prompt", disable=not progress)):
        if said := probe.read(prompt).p_success:
            found[row] = [said[name] for name in table.names]
    return found


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
    return heard.states(prompts, artifact.manifest.layers, progress, over=artifact.manifest.over)
