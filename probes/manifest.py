"""`probe.json`: what a fitted probe is, for those who need not run it. Light: gateway workers import this."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probes.errors import ArtifactError

FORMAT = 1
MANIFEST = "probe.json"


def default_artifact_path() -> Path:
    """The artifact shipped with the package."""
    return Path(__file__).parent / "artifacts" / "default"


class HeadInfo(BaseModel):
    """One head: what a label of 1 meant, and on how many labels it was fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str
    n: int
    base_rate: float
    calibration: Literal["platt", "isotonic"]


class Manifest(BaseModel):
    """What the tensors mean. `layers` are hidden-state indices, 0 being the embeddings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str = Field(min_length=1)
    encoder: str
    encoder_sha256: str
    layers: tuple[int, ...] = Field(min_length=1)
    dims: int
    pooling: Literal["mean"] = "mean"
    max_tokens: int
    heads: tuple[HeadInfo, ...] = Field(min_length=1)
    data_sha256: str
    n: int
    created: str
    """Date, ISO 8601."""
    versions: dict[str, str]
    metrics: dict[str, Any]
    tensors_sha256: str = ""


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of the artifact in `folder`. Raises ArtifactError with what is wrong and what to do."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"no probe artifact in {folder}: {error.strerror} ({error.filename})") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST} is not JSON: {error}") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{folder / MANIFEST}: format {version!r} is unknown, this release reads {FORMAT}; refit")
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{folder / MANIFEST}: {field}: {first['msg']} (got {first['input']!r})") from None
