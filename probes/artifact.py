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
from probes.heads import Experts, Groups, Heads, Similarity
from probes.manifest import (
    MANIFEST,
    TENSORS,
    ExpertInfo,
    Manifest,
    SimilarityInfo,
    read_manifest,
    version_of,
    write_manifest,
)
from probes.tensors import read_bytes

SIMILARITY = ("similarity.mean", "similarity.scale", "similarity.basis", "similarity.landmarks")
GROUPS = ("groups.weight", "groups.bias", "groups.means")
EXPERTS = ("experts.weight", "experts.bias")

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
    kernel, groups, experts = manifest.similarity, manifest.groups, manifest.experts
    expected = _weights(heads, features, kernel)
    for what, names in (("groups", groups), ("experts", experts)):
        if not names:
            continue
        if kernel is None:
            raise ArtifactError(f"{folder / MANIFEST}: {what} without a similarity to recognise them by; refit")
        expected[f"{what}.weight"] = (np.float32, (len(names), kernel.landmarks))
        expected[f"{what}.bias"] = (np.float32, (len(names),))
    if groups:
        expected["groups.means"] = (np.float32, (heads, len(groups)))
    shapes = {"platt": (2,), "isotonic": (2, -1)}
    for head in manifest.heads:
        if head.calibration in shapes:
            expected[f"calibration.{head.name}"] = (np.float64, shapes[head.calibration])
    for at, expert in enumerate(experts):
        expected |= _of_expert(at, expert, features, tensors, manifest, folder)
    _require(tensors, expected, folder)
    own: list[Heads | None] = []
    for at, expert in enumerate(experts):
        prefix = f"expert{at}."
        parts = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        own.append(_made(expert.heads, expert.similarity, parts, folder) if expert.heads else None)
    made = _made(tuple(head.name for head in manifest.heads), kernel, tensors, folder)
    recognised = Groups(groups, *(tensors[name] for name in GROUPS)) if groups else None
    kinds = tuple(expert.kind for expert in experts)
    mixed = Experts(kinds, tensors[EXPERTS[0]], tensors[EXPERTS[1]], tuple(own)) if experts else None
    return replace(made, groups=recognised, experts=mixed)


def _weights(heads: int, features: int, kernel: SimilarityInfo | None) -> Expected:
    """Of so many heads over so many features."""
    expected: Expected = {"weight": (np.float32, (heads, features)), "bias": (np.float32, (heads,))}
    if kernel is not None:
        expected["weight"] = (np.float32, (heads, kernel.landmarks))
        expected["similarity.mean"] = expected["similarity.scale"] = (np.float32, (features,))
        expected["similarity.basis"] = (np.float16, (features, kernel.components))
        expected["similarity.landmarks"] = (np.float16, (kernel.landmarks, kernel.components))
    return expected


def _of_expert(
    at: int,
    expert: ExpertInfo,
    features: int,
    tensors: Mapping[str, npt.NDArray[Any]],
    manifest: Manifest,
    folder: Path,
) -> Expected:
    """The tensors of one expert, by their full names."""
    if not expert.heads:
        return {}
    if unknown := set(expert.heads) - {head.name for head in manifest.heads}:
        raise ArtifactError(f"{folder / MANIFEST}: experts.{at}: no such head: {', '.join(sorted(unknown))}; refit")
    expected = _weights(len(expert.heads), features, expert.similarity)
    for name in expert.heads:
        kept = tensors.get(f"expert{at}.calibration.{name}")
        expected[f"calibration.{name}"] = (np.float64, (2,) if kept is None or kept.ndim == 1 else (2, -1))
    return {f"expert{at}.{name}": value for name, value in expected.items()}


def _made(
    names: tuple[str, ...], kernel: SimilarityInfo | None, tensors: Mapping[str, npt.NDArray[Any]], folder: Path
) -> Heads:
    """Heads out of tensors of the right shapes."""
    calibrators: list[Calibrator] = []
    for name in names:
        numbers = tensors.get(f"calibration.{name}")
        if numbers is None:
            calibrators.append(Exp())
        else:
            calibrators.append(Platt(*map(float, numbers)) if numbers.ndim == 1 else Isotonic(numbers[0], numbers[1]))
    similarity = None
    if kernel is not None:
        mean, scale, basis, landmarks = (tensors[name].astype(np.float64) for name in SIMILARITY)
        if not scale.all():
            raise ArtifactError(f"{folder / TENSORS}: similarity.scale holds 0; refit")
        similarity = Similarity(mean, scale, basis, landmarks, kernel.gamma)
    return Heads(names, tensors["weight"], tensors["bias"], tuple(calibrators), similarity)


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
    # safetensors writes memory as it lies: a transposed view would be stored wrongly.
    data: bytes = save({name: np.ascontiguousarray(value) for name, value in _tensors(heads).items()})
    return data


def _tensors(heads: Heads) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {"weight": heads.weight, "bias": heads.bias}
    if (kernel := heads.similarity) is not None:
        kept: list[npt.NDArray[Any]] = [one.astype(np.float32) for one in (kernel.mean, kernel.scale)]
        kept += [one.astype(np.float16) for one in (kernel.basis, kernel.landmarks)]
        tensors |= dict(zip(SIMILARITY, kept, strict=True))
    if (known := heads.groups) is not None:
        tensors |= dict(zip(GROUPS, (known.weight, known.bias, known.means), strict=True))
    if (mixed := heads.experts) is not None:
        tensors |= dict(zip(EXPERTS, (mixed.weight, mixed.bias), strict=True))
        for at, own in enumerate(mixed.own):
            if own is not None:
                tensors |= {f"expert{at}.{name}": value for name, value in _tensors(own).items()}
    for name, calibrator in zip(heads.names, heads.calibrators, strict=True):
        if not isinstance(calibrator, Exp):
            tensors[f"calibration.{name}"] = calibration_tensor(calibrator)
    return tensors


def calibration_kind(calibrator: Calibrator) -> Literal["platt", "isotonic"]:
    return "platt" if isinstance(calibrator, Platt) else "isotonic"


def calibration_tensor(calibrator: Calibrator) -> npt.NDArray[np.float64]:
    """[2] slope and intercept, or [2, knots]."""
    if isinstance(calibrator, Platt):
        return np.array([calibrator.slope, calibrator.intercept])
    if isinstance(calibrator, Isotonic):
        return np.stack([calibrator.x, calibrator.y])
    raise TypeError(f"cannot store a {type(calibrator).__name__}")
