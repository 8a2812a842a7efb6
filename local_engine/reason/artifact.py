"""A fitted exit rule on disk, beside the model it was fitted on: `exits.fit` (numbers, as safetensors), `exits.json`
(what they mean). Never pickle. Fitted and certified by `leadline exits`; the engine only reads it. No torch here, and
numpy only where tensors are read: a policy is checked by the manifest alone."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from operator import mul
from pathlib import Path
from typing import Any, Final

import msgspec

from local_engine.errors import ModelLoadError
from local_engine.plan_types import ExitForm, ExitLoss
from local_engine.reason.budget import BudgetLine
from local_engine.reason.cues import CUES
from local_engine.reason.thought import FEATURES

FORMAT: Final = 1
MANIFEST: Final = "exits.json"
TENSORS: Final = "exits.fit"
"""Not `.safetensors`: other engines take every such file in a model's folder for weights, and refuse the model."""
_NAMES: Final = ("mean", "scale", "weight", "bias")


class Certified(msgspec.Struct, frozen=True):
    """A threshold, and what is promised of it: P(a request is left early and that goes wrong) <= delta."""

    delta: float
    form: ExitForm
    loss: ExitLoss
    threshold: float
    """Leave where p is above this."""
    n: int
    """Trajectories that it was calibrated on."""


class ExitProbe(msgspec.Struct, frozen=True):
    """A logistic regression on standardised features: P(an answer forced here is right)."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    def p(self, values: Sequence[float]) -> float:
        """Of one cue. Raises ValueError where there are more or fewer values than it was fitted on."""
        if len(values) != len(self.weight):
            raise ValueError(f"the exit probe reads {len(self.weight)} features, not {len(values)}")
        standard = ((value - mean) / scale for value, mean, scale in zip(values, self.mean, self.scale, strict=True))
        return 0.5 * (1 + math.tanh(0.5 * (sum(map(mul, standard, self.weight)) + self.bias)))


class ExitManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the tensors mean."""

    model: str
    weights_sha256: str
    """Of the weight files: the artifact of another model is refused."""
    features: tuple[str, ...]
    layers: tuple[int, ...]
    """Whose hidden states at the cue follow the features."""
    certified: tuple[Certified, ...]
    budget_base: float
    budget_per_prompt_token: float
    n_fit: int
    n_calibration: int
    data_sha256: str
    created: str
    """Date, ISO 8601."""
    metrics: dict[str, Any]
    effort: str = "high"
    cues: tuple[str, ...] = CUES
    tensors_sha256: str = ""
    format: int = FORMAT

    def threshold(self, delta: float, form: ExitForm, loss: ExitLoss) -> float:
        """For the largest certified delta that is not above the one asked for. Raises ValueError if there is none."""
        if not 0 < delta < 1:
            raise ValueError(f"plan.delta must be between 0 and 1, not {delta}")
        fit = [one for one in self.certified if (one.form, one.loss) == (form, loss)]
        allowed = [one for one in fit if one.delta <= delta * (1 + 1e-9)]
        if not allowed:
            deltas = ", ".join(f"{one.delta:g}" for one in sorted(fit, key=lambda one: one.delta)) or "no delta"
            raise ValueError(
                f"plan.delta {delta:g} is not certified ({form}, loss {loss}); certified: {deltas}. Ask for one of"
                " them, or run `leadline exits certify` with more trajectories"
            )
        return max(allowed, key=lambda one: one.delta).threshold


class ExitArtifact(msgspec.Struct, frozen=True):
    manifest: ExitManifest
    probe: ExitProbe

    @property
    def budget(self) -> BudgetLine:
        return BudgetLine(self.manifest.budget_base, self.manifest.budget_per_prompt_token)


def write(artifact: ExitArtifact, folder: Path) -> None:
    """Write both files; the manifest goes last, so that it never stands for tensors of another fit."""
    import numpy as np
    from safetensors.numpy import save

    probe = artifact.probe
    data: bytes = save({name: np.atleast_1d(np.asarray(getattr(probe, name), np.float64)) for name in _NAMES})
    manifest = msgspec.structs.replace(artifact.manifest, tensors_sha256=hashlib.sha256(data).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(data)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def read_manifest(folder: Path) -> ExitManifest | None:
    """What the artifact in `folder` says of itself; None where there is none. Raises ModelLoadError, with the fix."""
    try:
        found = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = msgspec.json.decode(found, type=ExitManifest)
    except msgspec.DecodeError as error:
        raise ModelLoadError(f"{folder / MANIFEST}: {error}; run `leadline exits fit` again") from None
    if manifest.format != FORMAT or manifest.features != FEATURES:
        raise ModelLoadError(
            f"{folder / MANIFEST} is of another release (format {manifest.format}, {len(manifest.features)} features);"
            " run `leadline exits fit` again"
        )
    return manifest


def read(folder: Path) -> ExitArtifact | None:
    """The artifact in `folder`; None where there is none. Raises ModelLoadError with what is wrong and what to do."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    manifest = read_manifest(folder)
    if manifest is None:
        return None
    try:
        data = (folder / TENSORS).read_bytes()
        tensors = load(data)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{folder / TENSORS} cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != manifest.tensors_sha256:
        raise ModelLoadError(f"{folder / TENSORS} does not match tensors_sha256 in {MANIFEST}: restore both or refit")
    return ExitArtifact(manifest, _probe(tensors, folder))


def _probe(tensors: Mapping[str, Any], folder: Path) -> ExitProbe:
    values = {name: tuple(map(float, tensors[name])) for name in _NAMES if name in tensors}
    lengths = {len(values.get(name, ())) for name in ("mean", "scale", "weight")}
    numbers = [number for some in values.values() for number in some]
    if (
        len(values) != len(_NAMES)
        or len(lengths) != 1
        or len(values["bias"]) != 1
        or not all(map(math.isfinite, numbers))
    ):
        raise ModelLoadError(f"{folder / TENSORS} does not hold one finite {', '.join(_NAMES)} per feature; refit")
    return ExitProbe(values["mean"], values["scale"], values["weight"], values["bias"][0])


def weights_sha256(folder: Path) -> str:
    """Of the model's weight files, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_for(folder: Path) -> ExitArtifact | None:
    """The artifact of the model in `folder`. Raises ModelLoadError also where it was fitted on other weights."""
    artifact = read(folder)
    if artifact is not None and artifact.manifest.weights_sha256 != weights_sha256(folder):
        raise ModelLoadError(
            f"{folder / MANIFEST} was fitted on other weights than those beside it: its promises would not hold;"
            " run `leadline exits fit` again, or delete it"
        )
    return artifact
