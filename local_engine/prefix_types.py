"""What a prefix store tells others: events for whoever routes by its content, and numbers. No torch here.

The events have the shape of vLLM's KV events (msgpack, array-like, as in its `distributed/kv_events.py`), so that a
router that reads those reads these: a block is named by a hash that holds all tokens before it, and a removed one may
come back under the same name.
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
    salt: str = ""
    """The tenant that finds them."""


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False, tag=True):
    block_hashes: list[bytes]
    medium: str | None = None


KVEvent = BlockStored | BlockRemoved


class TierStats(msgspec.Struct, frozen=True):
    """One of the tiers below memory, since the start."""

    medium: str
    read_blocks: int
    written_blocks: int
    unusable_blocks: int
    """Read, but corrupt or not what their name says; removed."""
    failures: int
    away: bool
    """It failed and is left alone for a while."""
    seconds_per_byte: float | None
    """To read and check, a running mean; None before the first read."""


class PrefixStats(msgspec.Struct, frozen=True):
    """Tokens are counted since the start; a sequence that is looked up again after preemption counts again."""

    asked_tokens: int
    hit_tokens: int
    stored_tokens: int
    evicted_tokens: int
    refused_tokens: int
    """Not stored because everything in memory was held."""
    blocks: int
    held_blocks: int
    pinned_blocks: int
    bytes_used: int
    bytes_limit: int
    promoted_tokens: int = 0
    """Brought to memory from a slower tier."""
    resting: bool = False
    """So much of what it took in was evicted unused that it takes in only what is sure to be read again."""
    tiers: list[TierStats] = []
