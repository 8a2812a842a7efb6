"""The probe as the engine runs it: text in, calibrated P(correct) out. Loads no scikit-learn and no pandas."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from probes.artifact import Artifact, read
from probes.extract import Encoder
from probes.manifest import bands_of, default_artifact_path, reading_of
from probes.text import render
from probes.types import Bands, Reading


class EncoderProbe:
    """An encoder and the heads fitted on it. Satisfies the engine's `Prober` without knowing it.

    Calls are serialised by a lock: the tokenizer is not thread-safe, and the engine has one thread anyway.
    """

    def __init__(self, artifact: Artifact, encoder: Encoder) -> None:
        artifact.require_encoder(encoder.name, encoder.sha256)
        self._artifact, self._encoder = artifact, encoder
        self._layers = list(artifact.manifest.layers)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, artifact_dir: Path | str | None = None, encoder: str = "default") -> Self:
        """Load an artifact (None: the shipped one) and its encoder; raises ArtifactError or EncoderError."""
        artifact = read(default_artifact_path() if artifact_dir is None else Path(artifact_dir))
        return cls(artifact, Encoder.load(encoder))

    @property
    def version(self) -> str:
        return self._artifact.version

    @property
    def heads(self) -> tuple[str, ...]:
        return self._artifact.heads.names

    @property
    def bands(self) -> dict[str, Bands]:
        """Of its heads, what is known of their words."""
        return bands_of(self._artifact.manifest)

    def probe(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
        """Calibrated P(correct) per head for each conversation, read whole; one batch."""
        return [dict(reading.p_success) for reading in self.sound(conversations)]

    def sound(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Reading]:
        """What all heads say of each conversation, read whole; one batch."""
        texts = [render(conversation) for conversation in conversations]
        if not texts:
            return []
        with self._lock:
            hidden = self._encoder.features(texts, layers=self._layers, max_tokens=self._artifact.manifest.max_tokens)
        values = self._artifact.heads.predict_proba(hidden.reshape(len(texts), -1))
        return [reading_of(self._artifact.manifest.heads, row) for row in values.tolist()]

    def embed(self, texts: Sequence[str]) -> tuple[bytes, int, int]:
        """(float32 little-endian [n, dims] bytes of unit vectors, dims, tokens read)."""
        with self._lock:
            vectors, tokens = self._encoder.embed(texts)
        return vectors.astype("<f4").tobytes(), self._encoder.dims, tokens


class TextEncoder:
    """An encoder without a probe, for an engine that is asked for vectors alone. Satisfies the engine's `Prober`."""

    version = "none"
    heads = ()

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()

    @classmethod
    def load(cls, encoder: str = "default") -> Self:
        """Raises EncoderError."""
        return cls(Encoder.load(encoder))

    def sound(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Reading]:
        """No head, no word."""
        return [Reading() for _ in conversations]

    def embed(self, texts: Sequence[str]) -> tuple[bytes, int, int]:
        """(float32 little-endian [n, dims] bytes of unit vectors, dims, tokens read)."""
        with self._lock:
            vectors, tokens = self._encoder.embed(texts)
        return vectors.astype("<f4").tobytes(), self._encoder.dims, tokens
