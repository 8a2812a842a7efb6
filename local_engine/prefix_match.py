"""What a look-up in the prefix store found: blocks that stay until they are loaded."""

from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol, Self

import torch

from local_engine.prefix_block import Block

COPY_BLOCKS: Final = 32
"""Blocks moved by one copy: bounds the memory on the way."""


class KVSink(Protocol):
    """Where a match is loaded to; every `KVCache` is one."""

    def load(self, slot: int, start: int, data: torch.Tensor) -> None: ...


class Match:
    """The longest stored prefix of some tokens, safe from eviction until `close`."""

    def __init__(self, path: list[Block], block_tokens: int, release: Callable[[list[Block]], None]) -> None:
        self._block_tokens = block_tokens
        self._release = release
        self.blocks = path
        self.tokens = len(path) * block_tokens
        """How many tokens are matched: whole blocks."""

    def load(self, kv: KVSink, slot: int) -> None:
        """Copy the matched KV to the start of the empty `slot`."""
        step = self._block_tokens
        for first in range(0, len(self.blocks), COPY_BLOCKS):
            part = [block.data for block in self.blocks[first : first + COPY_BLOCKS]]
            kv.load(slot, first * step, torch.cat(part, dim=3))

    def tap_sum(self) -> torch.Tensor | None:
        """Hidden states summed over the matched tokens, float32 [tap_layers, width]; None if a block has none.

        Their mean over a whole prompt is (this + the sum over the tokens computed after the match) / prompt length.
        """
        total: torch.Tensor | None = None
        for block in self.blocks:
            if block.taps is None:
                return None
            total = block.taps.clone() if total is None else total.add_(block.taps)
        return total

    def close(self) -> None:
        """Let go of the blocks; more than once is the same as once."""
        path, self.blocks, self.tokens = self.blocks, [], 0
        self._release(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
