"""What a prefix store tells whoever routes by its content, in the shape of vLLM's KV events (msgpack, array-like).

As in vLLM's `distributed/kv_events.py`, so that a router that reads those reads these: a block is named by a hash that
holds all tokens before it, and a removed one may come back under the same name.
"""

import msgspec

MEMORY = "cpu"
"""Events are of blocks in memory; what is only in a slower tier takes a while to match."""


class BlockStored(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False, tag=True):
    """These blocks, each the parent of the next, can be matched from now on."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False, tag=True):
    block_hashes: list[bytes]
    medium: str | None = None


KVEvent = BlockStored | BlockRemoved
