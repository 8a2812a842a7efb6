"""The tree of a prefix store: what a block is, and what it may continue."""

from collections.abc import Iterator

import torch

from local_engine.prefix_identity import ADDRESS_BYTES, child_digest
from local_engine.prefix_slabs import Slot


class Node:
    """What blocks may continue: a root or a block."""

    __slots__ = ("children", "digest")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.children: dict[bytes, Block] = {}


class Root(Node):
    """Where one tenant's blocks begin."""

    __slots__ = ("salt",)

    def __init__(self, salt: bytes, digest: bytes) -> None:
        super().__init__(digest)
        self.salt = salt


class Block(Node):
    """Immutable KV of `block_tokens` tokens after `parent`."""

    __slots__ = ("data", "held", "parent", "pins", "slot", "taps", "tokens", "used")

    def __init__(self, parent: Node, tokens: bytes, data: torch.Tensor, taps: torch.Tensor | None) -> None:
        super().__init__(child_digest(parent.digest, tokens))
        self.parent = parent
        self.tokens = tokens
        self.data = data
        self.taps = taps
        self.held = 0
        """Open matches and pins through it; it cannot be evicted before this is 0."""
        self.pins = 0
        self.used = False
        """Whether it was ever matched, or is sure to be and says nothing by it."""
        self.slot: Slot | None = None
        """What `data` lies in; None: memory of its own. Whoever reads `data` keeps the block meanwhile."""

    @property
    def name(self) -> bytes:
        return self.digest[:ADDRESS_BYTES]


def below(node: Node) -> Iterator[Block]:
    """All blocks that continue `node`, children before parents; no recursion: a chain may be thousands deep."""
    order: list[Block] = []
    stack = list(node.children.values())
    while stack:
        block = stack.pop()
        order.append(block)
        stack.extend(block.children.values())
    return reversed(order)
