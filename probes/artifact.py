"""A fitted probe on disk: `probe.safetensors` (numbers) and `probe.json` (what they mean). Never pickle."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from probes.calibrate import Calibrator, Exp, Isotonic, Platt
from probes.cluster_table import ClusterTable
from probes.errors import ArtifactError
from probes.heads import Groups, Heads, Similarity
from probes.manifest import MANIFEST, TENSORS, Manifest, read_manifest, version_of, write_manifest
from probes.tensors import read_bytes

SIMILARITY = ("similarity.mean", "similarity.scale", "similarity.basis", "similarity.landmarks")
GROUPS = ("groups.weight", "groups.bias", "groups.means")

Expected = dict[str, tuple[type[np.floating], tuple[int, ...]]]
"""name: (dtype, shape); -1 stands for any length"""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A manifest and the heads it describes."""

    manifest: Manifest
    heads: Heads | ClusterTable

    @property
    def version(self) -> str:
        """Name and content hash; equal versions answer alike. What is only said of an artifact does not enter."""
        return version_of(self.manifest, _tensor_bytes(self.heads))

    def require_encoder(self, name: str, sha256: str) -> None:
        """Refuse an encoder other than the one the heads were fitted on."""
        if sha256 != self.manifest.encoder_sha256:
            raise ArtifactError(
                f"artifact {self.version} was fitted on encoder {self.manifest.encoder!r} "
                f"(sha256 {self.manifest.encoder_sha256}), but {name!r} has sha256 {sha256}: "
                "pass the right encoder or refit with `leadline probe fit`"
            )


def sealed(artifact: Artifact) -> Artifact:
    """With the digest of its tensors in the manifest, which certificates refer to."""
    digest = hashlib.sha256(_tensor_bytes(artifact.heads)).hexdigest()
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"tensors_sha256": digest}))


def write(artifact: Artifact, folder: Path) -> None:
    """Write both files; the manifest goes last, so a folder with one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(_tensor_bytes(artifact.heads))
    write_manifest(sealed(artifact).manifest, folder)


def read(folder: Path) -> Artifact:
    """Load and check an artifact; raises ArtifactError with what is wrong and what to do."""
    manifest = read_manifest(folder)
    if manifest.tier == "static":
        raise ArtifactError(f"{folder} is a probe of tier `static`, which reads words; one that reads states is wanted")
    data = read_bytes(folder, manifest)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / TENSORS} is not a safetensors file: {error}") from None
    made = _heads if manifest.clusters is None else _table
    return Artifact(manifest, made(manifest, tensors, folder))


def _table(manifest: Manifest, tensors: Mapping[str, npt.NDArray[Any]], folder: Path) -> ClusterTable:
    assert manifest.clusters is not None, "who calls has looked"
    about, features = manifest.clusters, len(manifest.layers) * manifest.dims
    _require(
        tensors,
        {"centres": (np.float32, (about.count, features)), "rates": (np.float32, (about.count, len(manifest.heads)))},
        folder,
    )
    names = tuple(head.name for head in manifest.heads)
    return ClusterTable(names, tensors["centres"], tensors["rates"], min(about.nearest, about.count), about.beta)


def _heads(manifest: Manifest, tensors: Mapping[str, npt.NDArray[Any]], folder: Path) -> Heads:
    heads, features = len(manifest.heads), len(manifest.layers) * manifest.dims
    expected: Expected = {
        "weight": (np.float32, (heads, features)),
        "bias": (np.float32, (heads,)),
    }
    if (kernel := manifest.similarity) is not None:
        expected["weight"] = (np.float32, (heads, kernel.landmarks))
        expected["similarity.mean"] = expected["similarity.scale"] = (np.float32, (features,))
        expected["similarity.basis"] = (np.float16, (features, kernel.components))
        expected["similarity.landmarks"] = (np.float16, (kernel.landmarks, kernel.components))
    if groups := manifest.groups:
        if manifest.similarity is None:
            raise ArtifactError(f"{folder / MANIFEST}: groups without a similarity to recognise them by; refit")
        expected["groups.weight"] = (np.float32, (len(groups), manifest.similarity.landmarks))
        expected["groups.bias"] = (np.float32, (len(groups),))
        expected["groups.means"] = (np.float32, (heads, len(groups)))
    shapes = {"platt": (2,), "isotonic": (2, -1)}
    for head in manifest.heads:
        if head.calibration in shapes:
            expected[f"calibration.{head.name}"] = (np.float64, shapes[head.calibration])
    _require(tensors, expected, folder)
    calibrators: list[Calibrator] = []
    for head in manifest.heads:
        numbers = tensors.get(f"calibration.{head.name}")
        if numbers is None:
            calibrators.append(Exp())
        else:
            calibrators.append(Platt(*map(float, numbers)) if numbers.ndim == 1 else Isotonic(numbers[0], numbers[1]))
    names = tuple(head.name for head in manifest.heads)
    similarity = None
    if kernel is not None:
        mean, scale, basis, landmarks = (tensors[name].astype(np.float64) for name in SIMILARITY)
        if not scale.all():
            raise ArtifactError(f"{folder / TENSORS}: similarity.scale holds 0; refit")
        similarity = Similarity(mean, scale, basis, landmarks, kernel.gamma)
    recognised = Groups(groups, *(tensors[name] for name in GROUPS)) if groups else None
    return Heads(names, tensors["weight"], tensors["bias"], tuple(calibrators), similarity, recognised)


def _require(tensors: Mapping[str, npt.NDArray[Any]], expected: Expected, folder: Path) -> None:
    """Raises ArtifactError for another set of tensors, another type or shape, NaN or infinity."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ArtifactError(f"{folder / TENSORS}: missing tensors {missing}, unexpected tensors {extra}; refit")
    for name, (dtype, shape) in expected.items():
        got = tensors[name]
        wanted = tuple(have if want == -1 else want for want, have in zip(shape, got.shape, strict=False))
        if got.dtype != dtype or got.shape != wanted or got.ndim != len(shape):
            raise ArtifactError(
                f"{folder / TENSORS}: {name} is {got.dtype}{list(got.shape)}, "
                f"the manifest asks for {np.dtype(dtype)}{list(shape)}; refit"
            )
        if not np.isfinite(got).all():
            raise ArtifactError(f"{folder / TENSORS}: {name} holds NaN or infinity; refit")


def _tensor_bytes(heads: Heads | ClusterTable) -> bytes:
    if isinstance(heads, ClusterTable):
        found: bytes = save({"centres": heads.centres, "rates": heads.rates})
        return found
    tensors: dict[str, npt.NDArray[Any]] = {"weight": heads.weight, "bias": heads.bias}
    if (kernel := heads.similarity) is not None:
        kept: list[npt.NDArray[Any]] = [one.astype(np.float32) for one in (kernel.mean, kernel.scale)]
        kept += [one.astype(np.float16) for one in (kernel.basis, kernel.landmarks)]
        tensors |= dict(zip(SIMILARITY, kept, strict=True))
    if (known := heads.groups) is not None:
        tensors |= dict(zip(GROUPS, (known.weight, known.bias, known.means), strict=True))
    for name, calibrator in zip(heads.names, heads.calibrators, strict=True):
        if not isinstance(calibrator, Exp):
            tensors[f"calibration.{name}"] = calibration_tensor(calibrator)
    # safetensors writes memory as it lies: a transposed view would be stored wrongly.
    data: bytes = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    return data


def calibration_kind(calibrator: Calibrator) -> Literal["platt", "isotonic"]:
    return "platt" if isinstance(calibrator, Platt) else "isotonic"


def calibration_tensor(calibrator: Calibrator) -> npt.NDArray[np.float64]:
    """[2] slope and intercept, or [2, knots]."""
    if isinstance(calibrator, Platt):
        return np.array([calibrator.slope, calibrator.intercept])
    if isinstance(calibrator, Isotonic):
        return np.stack([calibrator.x, calibrator.y])
    raise TypeError(f"cannot store a {type(calibrator).__name__}")
