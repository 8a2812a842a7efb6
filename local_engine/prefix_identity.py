"""What KV belongs to: which weights computed it, how it lies in memory, and whose it is.

Every block's address is a chain of blake2b digests that starts here, so KV of another tenant, model, adapter, dtype or
shape has another address, in every tier and after every restart.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import torch

from local_engine.kv import KVShape

ADDRESS_BYTES: Final = 16
"""Blocks are named by the first 128 bits of their digest; tiers that read names back compare all 256."""
_DIGEST_BYTES: Final = 32
_FORMAT: Final = b"leadline-kv-1"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and type of the tensors that a store takes and gives: [layers, 2 (K, V), kv_heads, tokens, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tap_layers: tuple[int, ...] = ()
    """Layers whose hidden states may be kept with a block, numbered as the runner does."""
    width: int = 0
    """Of a hidden state; needed where `tap_layers` are."""

    @classmethod
    def of(cls, shape: KVShape, tap_layers: Sequence[int] = (), width: int = 0) -> "KVLayout":
        """The layout of what a KV cache of this shape exports."""
        return cls(shape.layers, shape.kv_heads, shape.head_dim, shape.dtype, tuple(tap_layers), width)

    def shape(self, tokens: int) -> tuple[int, ...]:
        return (self.layers, 2, self.kv_heads, tokens, self.head_dim)

    def kv_bytes(self, tokens: int) -> int:
        return self.layers * 2 * self.kv_heads * tokens * self.head_dim * self.dtype.itemsize

    @property
    def tap_bytes(self) -> int:
        """Of one block's taps: a float32 sum over its tokens per tapped layer."""
        return len(self.tap_layers) * self.width * 4


@dataclass(frozen=True, slots=True)
class KVIdentity:
    """Everything but the tokens that decides the values in a block."""

    model: str
    weights: str
    """`weights_fingerprint` of the network; any constant will do for a store without slow tiers."""
    layout: KVLayout
    adapter: str = ""

    def root(self, salt: bytes, block_tokens: int) -> bytes:
        """The digest that the chains of the tenant `salt` start from."""
        layout = self.layout
        shape = f"{layout.shape(block_tokens)} {layout.dtype} {layout.tap_layers} {layout.width}"
        return _digest_of(
            (_FORMAT, salt, self.model.encode(), self.weights.encode(), self.adapter.encode(), shape.encode())
        )


def child_digest(parent: bytes, tokens: bytes) -> bytes:
    """The digest of the block with these `token_bytes` after the one (or the root) with the digest `parent`."""
    return blake2b(parent + tokens, digest_size=_DIGEST_BYTES).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Four bytes per token, in the machine's order; free of conversion for an `array` of 32-bit integers."""
    return (tokens if isinstance(tokens, array) and tokens.typecode in "Ii" else array("I", tokens)).tobytes()


def weights_fingerprint(network: Any) -> str:
    """A digest of every weight and of the configuration: KV of a fine-tuned copy is another model's.

    Reads all weights once, at about 1 GB/s: worth it only where KV outlives the process.
    """
    digest = blake2b(network.config.to_json_string().encode(), digest_size=_DIGEST_BYTES)
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of(fields: Iterable[bytes]) -> bytes:
    """Of length-prefixed fields, so that no two lists of fields read the same."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little") + field)
    return digest.digest()
