"""A block as bytes, for tiers that outlive the process: raw tensor bytes after a small msgpack header; no pickle.

    magic (8) | header length, CRC-32 of all that follows it (4 + 4, little endian) | header | K and V | hidden states

The reader states what it wants (this digest after this parent, these tokens, this layout), and anything else is
unusable: a truncated or changed file, one of another version or model, one under a name that is not its own.
"""

import struct
from dataclasses import dataclass
from typing import Final
from zlib import crc32

import msgspec
import torch

from local_engine.prefix_block import Block
from local_engine.prefix_identity import KVLayout

_MAGIC: Final = b"LLKV\x001\r\n"
_FIXED: Final = struct.Struct("<8sII")


class Unusable(Exception):
    """These bytes are not the block that was asked for."""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    digest: bytes
    parent: bytes
    tokens: bytes
    dtype: str
    shape: tuple[int, ...]
    taps: tuple[int, ...]
    """[tap_layers, width] of the sums of hidden states, or nothing."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which block is asked for."""

    digest: bytes
    parent: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Loaded:
    """A block as it was read."""

    tokens: bytes
    data: torch.Tensor
    taps: torch.Tensor | None


def encode(block: Block) -> bytes:
    header = msgspec.msgpack.encode(
        _Header(
            block.digest,
            block.parent.digest,
            block.tokens,
            str(block.data.dtype),
            tuple(block.data.shape),
            tuple(block.taps.shape) if block.taps is not None else (),
        )
    )
    body = b"".join((header, _bytes(block.data), _bytes(block.taps) if block.taps is not None else b""))
    return _FIXED.pack(_MAGIC, len(header), crc32(body)) + body


def decode(raw: bytes, wanted: Wanted, layout: KVLayout, block_tokens: int) -> Loaded:
    """The block in `raw`. Raises Unusable when it is not exactly `wanted` in this `layout`."""
    if len(raw) < _FIXED.size:
        raise Unusable(f"{len(raw)} bytes are no block")
    magic, header_length, crc = _FIXED.unpack_from(raw)
    body = memoryview(raw)[_FIXED.size :]
    if magic != _MAGIC:
        raise Unusable("another format")
    if crc32(body) != crc:
        raise Unusable("the checksum does not match")
    try:
        header = msgspec.msgpack.decode(body[:header_length], type=_Header)
    except msgspec.DecodeError as error:
        raise Unusable(f"the header cannot be read: {error}") from error
    tap_shape = (len(layout.tap_layers), layout.width)
    expected = _Header(
        wanted.digest, wanted.parent, wanted.tokens, str(layout.dtype), layout.shape(block_tokens),
        tap_shape if header.taps else (),
    )  # fmt: skip
    if header != expected:
        raise Unusable("another block")
    payload = bytearray(body[header_length:])  # a copy that the tensors own
    kv_bytes = layout.kv_bytes(block_tokens)
    if len(payload) != kv_bytes + (layout.tap_bytes if header.taps else 0):
        raise Unusable(f"{len(payload)} bytes of tensors")
    data = torch.frombuffer(payload, dtype=layout.dtype, count=kv_bytes // layout.dtype.itemsize)
    taps = torch.frombuffer(payload, dtype=torch.float32, offset=kv_bytes).clone() if header.taps else None
    return Loaded(wanted.tokens, data.reshape(expected.shape), taps.reshape(tap_shape) if taps is not None else None)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
