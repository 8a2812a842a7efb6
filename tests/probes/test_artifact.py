"""Artifacts come back bit for bit, and damaged or foreign ones are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from probes.artifact import Artifact, read, write
from probes.errors import ArtifactError
from probes.extract import file_sha256
from probes.heads import Heads
from probes.kernel import ProbeClassifier
from probes.manifest import MANIFEST, TENSORS, Manifest, version_of
from probes.train import experts_info, similarity_info


def test_round_trip_is_bit_equal(artifact: Artifact, tmp_path: Path) -> None:
    write(artifact, tmp_path)
    back = read(tmp_path)
    assert isinstance(back.heads, Heads)
    assert isinstance(artifact.heads, Heads)
    assert back.heads.weight.tobytes() == artifact.heads.weight.tobytes()
    assert back.version == artifact.version
    x = np.random.default_rng(0).normal(size=(5, 4 * 384)).astype(np.float32)
    assert back.heads.predict_proba(x).tobytes() == artifact.heads.predict_proba(x).tobytes()


def test_the_version_follows_the_content_and_nothing_else(artifact: Artifact, shifted: Artifact) -> None:
    later = artifact.manifest.model_copy(update={"created": "2030-01-01", "metrics": {"x": 1}})
    assert replace(artifact, manifest=later).version == artifact.version
    shorter = artifact.manifest.model_copy(update={"max_tokens": 32})
    assert replace(artifact, manifest=shorter).version != artifact.version
    assert shifted.version != artifact.version


OLD = Manifest.model_validate(
    {
        "tier": "prefill", "name": "old", "encoder": "e", "encoder_sha256": "0", "layers": [1], "dims": 2,
        "max_tokens": 8, "heads": [{"name": "a", "label": "a", "n": 9, "base_rate": 0.5, "calibration": "platt"}],
        "data_sha256": "0", "n": 9, "created": "2026-01-01", "versions": {}, "metrics": {},
    }
)  # fmt: skip


def test_an_artifact_keeps_its_version_when_manifests_can_say_more() -> None:
    """The hash was taken before they could: rows of a ledger, and what was learnt of a probe, go by it."""
    assert version_of(OLD, b"tensors") == "old@0bad80fa"
    assert version_of(OLD.model_copy(update={"over": "prompt"}), b"tensors") != version_of(OLD, b"tensors")


def test_another_encoder_is_refused(artifact: Artifact) -> None:
    artifact.require_encoder("toy-encoder", artifact.manifest.encoder_sha256)
    with pytest.raises(ArtifactError, match=r"was fitted on encoder 'toy-encoder'.*'other' has sha256 00"):
        artifact.require_encoder("other", "00")


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def _tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        _edit(lambda m: m.update(tensors_sha256=file_sha256(folder / TENSORS)))(folder)

    return apply


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_edit(lambda m: m.update(format=2)), "format 2 is unknown"),
        (_edit(lambda m: m.pop("format")), "format None is unknown"),
        (_edit(lambda m: m.update(surprise=1)), "surprise"),
        (_edit(lambda m: m.pop("encoder_sha256")), "encoder_sha256"),
        (_edit(lambda m: m.update(tensors_sha256="0")), "does not match tensors_sha256"),
        (_tensors(lambda t: t.pop("bias")), r"missing tensors \['bias'\]"),
        (_tensors(lambda t: t.update(more=np.ones(1))), r"unexpected tensors \['more'\]"),
        (_tensors(lambda t: t.update(bias=np.ones(3, np.float32))), r"bias is float32\[3\]"),
        (_tensors(lambda t: t.update(bias=np.ones(2))), r"bias is float64\[2\]"),
        (_tensors(lambda t: t.update({"calibration.weak": np.ones((2, 3))})), r"calibration.weak is"),
        (_tensors(lambda t: t.update(bias=np.full(2, np.nan, np.float32))), "NaN"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not JSON"),
        (lambda folder: (folder / TENSORS).unlink(), "no probe artifact"),
    ],
)
def test_refusals(artifact: Artifact, tmp_path: Path, damage: Callable[[Path], None], complaint: str) -> None:
    write(artifact, tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=complaint):
        read(tmp_path)


def test_a_similarity_comes_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4 * 384)).astype(np.float32)
    heads = ProbeClassifier(components=8, landmarks=20).fit(X, (X[:, :2] > 0) * 1.0, names=("weak", "strong")).heads_
    infos = tuple(head.model_copy(update={"calibration": "platt"}) for head in artifact.manifest.heads)
    fitted = artifact.manifest.model_copy(update={"heads": infos, "similarity": similarity_info(heads)})
    write(Artifact(fitted, heads), tmp_path)
    back = read(tmp_path)
    assert back.version == Artifact(fitted, heads).version
    assert back.heads.predict_proba(X).tobytes() == heads.predict_proba(X).tobytes()
    _tensors(lambda t: t.update({"similarity.scale": np.zeros(4 * 384, np.float32)}))(tmp_path)
    with pytest.raises(ArtifactError, match="holds 0"):
        read(tmp_path)


def test_groups_come_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4 * 384)).astype(np.float32)
    groups = np.where(X[:, 0] > 0, "a", "b").astype(object)
    model = ProbeClassifier(components=8, landmarks=20).fit(X, (X[:, :2] > 0) * 1.0, ("weak", "strong"), groups)
    heads = model.heads_
    infos = tuple(head.model_copy(update={"calibration": "platt"}) for head in artifact.manifest.heads)
    changed = {"heads": infos, "similarity": similarity_info(heads), "groups": ("a", "b")}
    fitted = Artifact(artifact.manifest.model_copy(update=changed), heads)
    write(fitted, tmp_path)
    assert read(tmp_path).heads.predict_proba(X).tobytes() == heads.predict_proba(X).tobytes()
    _edit(lambda m: m.update(groups=["a", "b", "c"]))(tmp_path)
    with pytest.raises(ArtifactError, match=r"groups.weight is float32\[2, 20\], .* float32\[3, 20\]"):
        read(tmp_path)
    _edit(lambda m: m.update(groups=[]))(tmp_path)
    with pytest.raises(ArtifactError, match=r"unexpected tensors .*groups\.bias"):
        read(tmp_path)
    _edit(lambda m: m.update(groups=["a", "b"], similarity=None))(tmp_path)
    with pytest.raises(ArtifactError, match="groups without a similarity"):
        read(tmp_path)


def test_experts_come_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(900, 4 * 384)).astype(np.float32)
    kinds = np.where(X[:, 0] > 0, "a", "b").astype(object)
    labels = (X[:, :2] > 0) * 1.0
    labels[kinds == "b", 1] = np.nan
    model = ProbeClassifier(components=8, landmarks=20).fit(X, labels, ("weak", "strong"), experts=kinds)
    heads = model.heads_
    infos = tuple(head.model_copy(update={"calibration": "platt"}) for head in artifact.manifest.heads)
    about = experts_info(heads)
    assert [(one.kind, one.heads) for one in about] == [("a", ("strong",)), ("b", ())]
    changed = {"heads": infos, "similarity": similarity_info(heads), "experts": about}
    fitted = Artifact(artifact.manifest.model_copy(update=changed), heads)
    write(fitted, tmp_path)
    back = read(tmp_path)
    assert back.version == fitted.version
    assert back.heads.predict_proba(X).tobytes() == heads.predict_proba(X).tobytes()
    _edit(lambda m: m["experts"].append({"kind": "c"}))(tmp_path)
    with pytest.raises(ArtifactError, match=r"experts.weight is float32\[2, 20\], .* float32\[3, 20\]"):
        read(tmp_path)
    _edit(lambda m: m.update(experts=[{"kind": "a", "heads": ["x"]}, {"kind": "b"}]))(tmp_path)
    with pytest.raises(ArtifactError, match=r"experts.0: no such head: x"):
        read(tmp_path)
    _edit(lambda m: m.update(experts=[{"kind": "a"}, {"kind": "b"}]))(tmp_path)
    with pytest.raises(ArtifactError, match=r"unexpected tensors .*expert0\.bias"):
        read(tmp_path)
