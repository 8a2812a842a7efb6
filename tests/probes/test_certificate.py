"""A certificate goes with its artifact and no other, and says which head may be trusted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from probes.artifact import Artifact, read, write
from probes.errors import ArtifactError
from probes.manifest import BELOW_ALL, MANIFEST, Certificate, Manifest, read_manifest, write_manifest

CERTIFICATE = Certificate(
    loss="weak_wrong_strong_right",
    heads=("weak", "strong"),
    method="ltt",
    alpha=0.05,
    delta=0.05,
    horizon=1000,
    threshold=-0.1,
    n=1000,
    risk=0.04,
    shares={"weak": 0.7, "strong": 0.3},
    rows="held_out",
    data_sha256="1",
    tensors_sha256="",
    encoder_sha256="",
    created="2026-01-01",
)


@pytest.fixture
def certified(artifact: Artifact, tmp_path: Path) -> Path:
    """A folder with an artifact and a certificate that is its own."""
    write(artifact, tmp_path)
    manifest = read_manifest(tmp_path)
    ids = {"tensors_sha256": manifest.tensors_sha256, "encoder_sha256": manifest.encoder_sha256}
    own = CERTIFICATE.model_copy(update=ids)
    write_manifest(manifest.model_copy(update={"certificates": (own,)}), tmp_path)
    return tmp_path


def test_it_comes_back_and_leaves_the_version_alone(artifact: Artifact, certified: Path) -> None:
    back = read(certified)
    assert back.version == artifact.version
    (one,) = back.manifest.certificates
    assert one.model_copy(update={"tensors_sha256": "", "encoder_sha256": ""}) == CERTIFICATE
    assert str(one) == (
        "at most 0.05 weak wrong, strong right, with 0.95 confidence over 1000 queries (ltt, 1000 held-out rows)"
    )


def test_a_certificate_does_not_outlive_a_refit(shifted: Artifact, certified: Path) -> None:
    write(replace(shifted, manifest=read_manifest(certified)), certified)
    with pytest.raises(ArtifactError, match=r"certificates\.0: tensors_sha256 is .*leadline probe certify` anew"):
        read_manifest(certified)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"encoder_sha256": "00"}, r"certificates\.0: encoder_sha256 is 00"),
        ({"heads": ["weak", "other"]}, "head 'other' is not of this artifact, which has weak, strong"),
        ({"threshold": 1.5}, r"certificates\.0\.threshold: .* less than or equal to 1"),
        ({"alpha": 0}, r"certificates\.0\.alpha"),
        ({"surprise": 1}, r"certificates\.0\.surprise"),
    ],
)
def test_a_foreign_or_damaged_certificate_is_refused(
    certified: Path, change: dict[str, object], complaint: str
) -> None:
    found = json.loads((certified / MANIFEST).read_text())
    found["certificates"][0].update(change)
    (certified / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=complaint):
        read_manifest(certified)


def certificates(*changes: dict[str, object]) -> tuple[Certificate, ...]:
    return tuple(CERTIFICATE.model_copy(update=change) for change in changes)


def test_the_loosest_sufficient_certificate_is_found(artifact: Artifact) -> None:
    manifest: Manifest = artifact.manifest.model_copy(
        update={
            "certificates": certificates(
                {"alpha": 0.02, "threshold": 0.3},
                {"alpha": 0.05, "threshold": -0.1},
                {"alpha": 0.1, "threshold": -0.5},
                {"alpha": 0.05, "threshold": -0.2, "method": "crc", "delta": None, "horizon": None},
                {"alpha": 0.05, "threshold": 0.6, "loss": "accepted_wrong", "heads": ("weak",)},
            )
        }
    )

    def threshold(alpha: float, **which: object) -> float | None:
        found = manifest.certificate_for(alpha, **which)  # type: ignore[arg-type]  # the options of one call each
        return None if found is None else found.threshold

    assert threshold(0.05) == -0.1
    assert threshold(0.07) == -0.1
    assert threshold(0.5) == -0.5
    assert threshold(0.01) is None
    assert threshold(0.05, method="crc") == -0.2
    assert threshold(0.05, loss="accepted_wrong") == 0.6
    assert threshold(0.05, heads=("weak", "strong")) == -0.1
    assert threshold(0.05, heads=("strong", "weak")) is None


def test_the_threshold_itself_is_not_above_it() -> None:
    assert CERTIFICATE.accepts({"weak": 0.5, "strong": 0.59})
    even = CERTIFICATE.model_copy(update={"threshold": 0.25})
    assert not even.accepts({"weak": 0.75, "strong": 0.5})
    assert even.choose({"weak": 0.75, "strong": 0.5}) == "strong"
    assert even.model_copy(update={"threshold": BELOW_ALL}).accepts({"weak": 0.0, "strong": 1.0})


def test_among_many_the_cheapest_that_is_sure_enough_is_chosen() -> None:
    many = CERTIFICATE.model_copy(update={"heads": ("tiny", "small", "large"), "threshold": -0.1})
    assert many.choose({"tiny": 0.85, "small": 0.95, "large": 0.9}) == "tiny"
    assert many.choose({"tiny": 0.7, "small": 0.85, "large": 0.9}) == "small"
    assert many.choose({"tiny": 0.7, "small": 0.75, "large": 0.9}) == "large"


def test_one_head_is_accepted_by_its_own_probability() -> None:
    accept = CERTIFICATE.model_copy(update={"loss": "accepted_wrong", "heads": ("weak",), "threshold": 0.8})
    assert accept.accepts({"weak": 0.81, "strong": 0.9})
    assert not accept.accepts({"weak": 0.8, "strong": 0.1})
