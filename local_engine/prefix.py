"""The prefix store: KV of token prefixes that were computed before, in blocks of a fixed number of tokens.

A tree per tenant. The children of a block are found by the very bytes of their tokens, so a match is exact by
construction: no hash decides it. Each block also has a digest chained over (salt, model, adapter, dtype and layout,
parent, tokens), computed once from its parent's; it is the block's name in events and in the slower tiers.

    root(tenant) ─ "You are a help" ─ "ful assistant." ┬ " What is 2+2?"          held: open matches and pins
                                                       └ " Where is Rome"         LRU: [deepest, oldest … root, newest]

A sequence copies matched blocks into its own KV at admission and copies new ones out after its prompt is read and when
it ends: eviction never touches a running sequence. Whoever is used last is evicted last, and children before parents:
a path is put at the young end deepest block first, and what is held is held with all its ancestors, so the old end of
the list is always a leaf.

Where next to nothing that it has is ever used, a store without slower tiers rests: `prefix_admission.py`.

Owned by the engine's thread. Everything is O(blocks of the prefix); one eviction is O(1).
"""

import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from local_engine.prefix_admission import Admission
from local_engine.prefix_block import Block, Node, Root, below
from local_engine.prefix_format import Wanted
from local_engine.prefix_identity import KVIdentity, child_digest, token_bytes
from local_engine.prefix_match import COPY_BLOCKS, Match
from local_engine.prefix_slabs import Slabs
from local_engine.prefix_tiers import Fetch, SlowTiers
from local_engine.prefix_types import MEMORY, BlockRemoved, BlockStored, KVEvent, PrefixStats

Export = Callable[[int, Sequence[torch.Tensor]], None]
"""(start, blocks): copy the KV of the tokens from `start` on into these, [layers, 2, kv_heads, block_tokens, head_dim]
each. Raises ValueError for KV of another shape or type."""
Taps = Callable[[int, int], torch.Tensor | None]
"""(start, stop) → hidden states of these blocks, summed over each one's tokens, [stop - start, tap_layers, width]; None
where they were not kept."""

_TOKEN_BYTES: Final = 4
_WEIGHT: Final = 0.2
"""Of the newest measurement in a running mean."""
_LEAST_OBSERVED: Final = 64
"""Tokens of a step whose time is taken."""
_OVERHEAD_BYTES: Final = 1024
"""What one block costs beside its tensors, in Python and torch objects: measured."""


class PrefixStore:
    """Stored prefixes of one model, within `bytes_limit` bytes of memory. See the module for its rules."""

    def __init__(
        self,
        identity: KVIdentity,
        *,
        bytes_limit: int,
        block_tokens: int = 16,
        slow: SlowTiers | None = None,
        on_event: Callable[[KVEvent], None] | None = None,
    ) -> None:
        if bytes_limit < 0 or block_tokens < 1:
            raise ValueError(
                f"bytes_limit must be at least 0 and block_tokens at least 1, not {bytes_limit} and {block_tokens}"
            )
        self.identity = identity
        self.block_tokens = block_tokens
        self.bytes_limit = bytes_limit
        self.slow = slow
        self.on_event = on_event
        """Hears of blocks that come and go; None: nobody does, and nothing is put into words."""
        self._roots: dict[bytes, Root] = {}
        self._slabs = Slabs(identity.layout, block_tokens)
        self._free: OrderedDict[Block, None] = OrderedDict()
        """Blocks that nobody holds, the next to be evicted first."""
        self._pins: dict[tuple[bytes, bytes], list[Block]] = {}
        self._fetches: deque[tuple[Fetch, bytes, list[Block]]] = deque()
        """Under way: whose they are, and the held path that they continue."""
        self._admission = Admission(bytes_limit)
        self._compute_s: float | None = None
        """To compute one prompt token, a running mean."""
        self._blocks = self._bytes = self._pinned_blocks = 0
        self._asked = self._hit = self._stored = self._evicted = self._refused = self._promoted = 0
        self._bare_block_bytes = identity.layout.kv_bytes(block_tokens) + block_tokens * _TOKEN_BYTES + _OVERHEAD_BYTES

    @property
    def resting(self) -> bool:
        """Whether only what is sure to be read again is taken in. Slower tiers keep for longer than this can tell."""
        return self.slow is None and self._admission.resting

    def lookup(self, salt: bytes, tokens: Sequence[int], *, taps: bool = False) -> Match:
        """The longest stored prefix of `tokens`, but for the last of them, which is always left to compute.

        With `taps`, only of blocks whose hidden states were kept. Close the match once it is loaded.
        """
        self._adopt()
        data, count = token_bytes(tokens), self._matchable(tokens)
        path = self._walk(salt, data, count)
        if self.resting and len(path) < count:
            self._miss(salt, path, data, count)
        if taps:
            bare = next((i for i, block in enumerate(path) if block.taps is None), len(path))
            del path[bare:]
        self._hold(path)
        self._use(path)
        self._asked += len(tokens)
        self._hit += len(path) * self.block_tokens
        return Match(path, self.block_tokens, self._release)

    def peek(self, salt: bytes, tokens: Sequence[int]) -> int:
        """How many tokens `lookup` would match now. Neither counted nor a use."""
        return len(self._walk(salt, token_bytes(tokens), self._matchable(tokens))) * self.block_tokens

    def prefetch(self, salt: bytes, tokens: Sequence[int]) -> Fetch | None:
        """Bring what is missing in memory of the prefix of `tokens` from the slower tiers, where that may pay.

        None when there is nothing to wait for. Else `lookup` finds what has come once the fetch is `ready`: when all
        is read, or when waiting longer would take longer than computing the tokens or than the tiers' `wait_s`.
        """
        if self.slow is None:
            return None
        self._adopt()
        data = token_bytes(tokens)
        count = self._matchable(tokens)
        path = self._walk(salt, data, count)
        if len(path) == count:
            return None
        root = self.identity.root(salt, self.block_tokens)
        size = self.block_tokens * _TOKEN_BYTES
        first = self._digest_after(salt, path, data)
        if not self.slow.may_have(root, first, self._compute_s_per_byte()):
            return None
        wanted = []
        parent = path[-1].digest if path else root
        for start in range(len(path) * size, count * size, size):
            part = data[start : start + size]
            digest = child_digest(parent, part)
            wanted.append(Wanted(digest, parent, part))
            parent = digest
        compute_s = self._compute_s * len(wanted) * self.block_tokens if self._compute_s is not None else math.inf
        fetch = Fetch(root, wanted, self.identity.layout, self.block_tokens, min(self.slow.wait_s, compute_s))
        self._hold(path)
        self._fetches.append((fetch, salt, path))
        self.slow.fetch(fetch)
        return fetch

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A step took `seconds` to compute `tokens` prompt tokens: what slower tiers are measured against.

        Steps of few tokens say more of what a step costs than of a token, and are not counted.
        """
        if tokens < _LEAST_OBSERVED:
            return
        new = seconds / tokens
        self._compute_s = new if self._compute_s is None else self._compute_s + _WEIGHT * (new - self._compute_s)

    def commit(
        self, salt: bytes, tokens: Sequence[int], export: Export, taps: Taps | None = None, *, needed: bool = True
    ) -> int:
        """Store the full blocks of `tokens` that are not there yet; how many tokens that were.

        All of `tokens` must have been computed and accepted: no drafts. `export` is called for what is missing,
        `taps` also for blocks that were stored without. Where memory is short, older blocks go first; where all of it
        is held, the rest of `tokens` is not stored. While the store rests, nothing is that is not `needed`, that is,
        sure to be read again. Raises what `export` raises, and stores nothing that it was for.
        """
        data = token_bytes(tokens)
        count = len(tokens) // self.block_tokens
        if count == 0:
            return 0
        path = self._walk(salt, data, count)
        resting = self.resting
        self._hold(path)  # what is continued here must not be evicted to make room for the continuation
        known = len(path)
        try:
            richer = self._add_taps(path, taps) if taps is not None else []
            for start in range(known, count if needed or not resting else known, COPY_BLOCKS):
                wanted = min(COPY_BLOCKS, count - start)
                fits = self._make_room(wanted, taps is not None)
                if fits:
                    self._store_blocks(salt, path, data, start, start + fits, export, taps)
                    for block in path[start:] if resting else ():
                        block.used = True  # by whoever needs it, whose hit says nothing of what is left out
                if fits < wanted:
                    self._refused += (count - start - fits) * self.block_tokens
                    break
            self._hand_down(salt, path, richer, path[known:])
        finally:
            self._release(path)
        return (len(path) - known) * self.block_tokens

    def pin(self, salt: bytes, tokens: Sequence[int]) -> int:
        """Keep the stored full blocks of `tokens` from eviction until `unpin`; how many tokens are pinned by it.

        Pins may hold half of the store: of a prefix that is longer than what is left of it, the beginning is pinned.
        Pinning the same tokens again takes in what was stored since.
        """
        data = token_bytes(tokens)
        self.unpin(salt, tokens)
        path = self._walk(salt, data, len(tokens) // self.block_tokens)
        room = self.bytes_limit // 2
        pinned = []
        for block in path:
            if block.pins == 0:
                if (self._pinned_blocks + 1) * self._bare_block_bytes > room:
                    break
                self._pinned_blocks += 1
            block.pins += 1
            pinned.append(block)
        if pinned:
            self._hold(pinned)
            self._pins[salt, data] = pinned
        return len(pinned) * self.block_tokens

    def unpin(self, salt: bytes, tokens: Sequence[int]) -> int:
        """Undo `pin` of the same tokens; how many were pinned by it."""
        pinned = self._pins.pop((salt, token_bytes(tokens)), [])
        for block in pinned:
            block.pins -= 1
            self._pinned_blocks -= block.pins == 0
        self._release(pinned)
        return len(pinned) * self.block_tokens

    def evict(self, salt: bytes, tokens: Sequence[int] = ()) -> int:
        """Forget what continues `tokens`, and of `tokens` what nothing else continues; how many tokens that were.

        Without `tokens`: all that the tenant has, in every tier. With them: what is in memory, and the same blocks
        below. What is held or pinned stays, with what it continues; what is on its way to the tenant is dropped.
        """
        self._drop_fetches(salt)
        count = len(tokens) // self.block_tokens
        path = self._walk(salt, token_bytes(tokens), count)
        top = path[-1] if path else self._roots.get(salt)
        if tokens and not path:
            return 0
        doomed = [*(below(top) if top is not None and len(path) == count else ()), *reversed(path)]
        before = self._evicted
        gone = []
        for block in doomed:
            if block.held == 0 and not block.children:
                del self._free[block]
                self._remove(block)
                gone.append(block.digest)
        if self.slow is not None:
            self.slow.forget(self.identity.root(salt, self.block_tokens), gone if tokens else None)
        return self._evicted - before

    def inventory(self) -> Iterator[KVEvent]:
        """All that is in memory, as it would have been told; each block after the one that it continues."""
        for salt, root in self._roots.items():
            for block in reversed(list(below(root))):
                yield self._stored_event(salt, [block])

    def stats(self) -> PrefixStats:
        return PrefixStats(
            asked_tokens=self._asked,
            hit_tokens=self._hit,
            stored_tokens=self._stored,
            evicted_tokens=self._evicted,
            refused_tokens=self._refused,
            blocks=self._blocks,
            held_blocks=self._blocks - len(self._free),
            pinned_blocks=self._pinned_blocks,
            bytes_used=self._bytes,
            bytes_limit=self.bytes_limit,
            promoted_tokens=self._promoted,
            resting=self.resting,
            tiers=self.slow.stats() if self.slow is not None else [],
        )

    def problems(self) -> list[str]:
        """What is wrong with the store's books: nothing, unless there is a bug in it."""
        found = []
        blocks = [block for root in self._roots.values() for block in below(root)]
        if len(blocks) != self._blocks or sum(map(self._size, blocks)) != self._bytes:
            found.append(f"counted {self._blocks} blocks of {self._bytes} bytes, but there are {len(blocks)}")
        if self._bytes > self.bytes_limit:
            found.append(f"{self._bytes} bytes are used of {self.bytes_limit}")
        if {block for block in blocks if block.held == 0} != set(self._free):
            found.append("the blocks that nobody holds are not those that can be evicted")
        order = {block: place for place, block in enumerate(self._free)}
        found.extend(
            f"block {block.name.hex()} would be evicted before one that continues it"
            for block in self._free
            if any(order.get(child, self._blocks) > order[block] for child in block.children.values())
        )
        if sum(block.pins > 0 for block in blocks) != self._pinned_blocks:
            found.append(f"{self._pinned_blocks} blocks are counted as pinned")
        if any(not root.children for root in self._roots.values()):
            found.append("a tenant without blocks is remembered")
        return found

    def _matchable(self, tokens: Sequence[int]) -> int:
        """Blocks that a match may have: the last token is computed, for its logits and its hidden state."""
        return max(0, len(tokens) - 1) // self.block_tokens

    def _walk(self, salt: bytes, data: bytes, count: int) -> list[Block]:
        """The first blocks, at most `count`, of the tokens `data` that are stored."""
        path: list[Block] = []
        node: Node | None = self._roots.get(salt)
        if node is None:
            return path
        size = self.block_tokens * _TOKEN_BYTES
        for start in range(0, count * size, size):
            block = node.children.get(data[start : start + size])
            if block is None:
                break
            path.append(block)
            node = block
        return path

    def _miss(self, salt: bytes, path: list[Block], data: bytes, count: int) -> None:
        """A prompt that is not to be stored lacks the blocks after `path`, up to `count` of its tokens `data`."""
        self._admission.missed(self._digest_after(salt, path, data), (count - len(path)) * self._bare_block_bytes)

    def _digest_after(self, salt: bytes, path: list[Block], data: bytes) -> bytes:
        """Of the block that continues `path`, the first blocks of the tokens `data`."""
        at, size = len(path), self.block_tokens * _TOKEN_BYTES
        parent = path[-1].digest if path else self.identity.root(salt, self.block_tokens)
        return child_digest(parent, data[at * size : (at + 1) * size])

    def _use(self, path: list[Block]) -> None:
        for block in path:
            if not block.used:
                block.used = True
                self._admission.used(self._size(block))

    def _hold(self, path: list[Block]) -> None:
        for block in path:
            if block.held == 0:
                del self._free[block]
            block.held += 1

    def _release(self, path: list[Block]) -> None:
        """Undo `_hold`; what nobody holds any more is now the youngest, parents younger than children."""
        for block in reversed(path):
            block.held -= 1
            if block.held == 0:
                self._free[block] = None

    def _make_room(self, count: int, taps: bool) -> int:
        """Evict until `count` more blocks fit, or all that can be; how many fit then."""
        size = self._bare_block_bytes + (self.identity.layout.tap_bytes if taps else 0)
        self._evict_for(count * size)
        return min(count, (self.bytes_limit - self._bytes) // size)

    def _evict_for(self, size: int) -> None:
        """Evict until so many bytes more fit, or all that can be."""
        while self._free and self._bytes + size > self.bytes_limit:
            block, _ = self._free.popitem(last=False)
            if not block.used:
                self._admission.evicted(self._size(block))
            self._remove(block)

    def _store_blocks(
        self, salt: bytes, path: list[Block], data: bytes, start: int, stop: int, export: Export, taps: Taps | None
    ) -> None:
        """Add the blocks `start` to `stop` of the tokens `data`, held, at the end of `path`."""
        tokens = self.block_tokens
        slots = [self._slabs.take() for _ in range(start, stop)]
        export(start * tokens, [slot.tensor for slot in slots])
        sums = self._tap_sums(taps, start, stop) if taps is not None else None
        root = self._root(salt)
        size = tokens * _TOKEN_BYTES
        for i, slot in enumerate(slots, start):
            node = path[-1] if path else root
            added = self._add(node, data[i * size : (i + 1) * size], slot.tensor, sums[i - start] if sums else None)
            added.slot = slot
            path.append(added)
        self._stored += (stop - start) * tokens
        self._tell_stored(salt, path[start:])

    def _add(self, parent: Node, tokens: bytes, data: torch.Tensor, taps: torch.Tensor | None) -> Block:
        """A new block, held once."""
        block = parent.children[tokens] = Block(parent, tokens, data, taps)
        block.held = 1
        self._blocks += 1
        self._bytes += self._size(block)
        return block

    def _tap_sums(self, taps: Taps, start: int, stop: int) -> list[torch.Tensor] | None:
        """Per block its hidden states summed over its tokens, float32 [tap_layers, width]."""
        sums = taps(start, stop)
        if sums is None:
            return None
        layout = self.identity.layout
        shape = (stop - start, len(layout.tap_layers), layout.width)
        if sums.shape != shape:
            raise ValueError(f"taps gave {tuple(sums.shape)}; this store keeps layers {layout.tap_layers}, so {shape}")
        return [part.clone() for part in sums.unbind(0)]  # of its own memory each, as each is evicted by itself

    def _hand_down(self, salt: bytes, path: list[Block], richer: list[Block], new: list[Block]) -> None:
        """Let the slower tiers keep `path`, whose blocks `new` they may not have, and `richer` not with their taps."""
        if self.slow is not None and path:
            size = sum(map(self._size, (*new, *richer)))
            root = self._root(salt).digest
            self.slow.keep(root, tuple(path), frozenset(richer), size, self._compute_s_per_byte())

    def _adopt(self) -> None:
        """Take in what the slower tiers have brought."""
        for _ in range(len(self._fetches)):
            fetch, salt, path = self._fetches.popleft()
            if not fetch.finished:
                self._fetches.append((fetch, salt, path))
                continue
            for loaded in fetch.loaded:
                node: Node | None = path[-1] if path else self._roots.get(salt)
                block = node.children.get(loaded.tokens) if node is not None else None
                if block is not None:  # computed meanwhile, or fetched twice
                    self._hold([block])
                elif self._make_room(1, loaded.taps is not None):
                    block = self._add(path[-1] if path else self._root(salt), loaded.tokens, loaded.data, loaded.taps)
                    self._promoted += self.block_tokens
                    self._tell_stored(salt, [block])
                else:
                    break
                path.append(block)
            self._release(path)

    def _drop_fetches(self, salt: bytes) -> None:
        """Let go of what the slower tiers have brought, or are still to bring, for this tenant."""
        dropped = [path for _, owner, path in self._fetches if owner == salt]
        self._fetches = deque(entry for entry in self._fetches if entry[1] != salt)
        for path in dropped:
            self._release(path)

    def _compute_s_per_byte(self) -> float | None:
        """What computing KV costs, to be compared with reading it."""
        return None if self._compute_s is None else self._compute_s / self.identity.layout.kv_bytes(1)

    def _add_taps(self, path: list[Block], taps: Taps) -> list[Block]:
        """Add what is missing of hidden states to blocks that are held; to which."""
        richer = []
        size = self.identity.layout.tap_bytes
        for i, block in enumerate(path):
            sums = self._tap_sums(taps, i, i + 1) if block.taps is None else None
            if sums is None:
                continue
            self._evict_for(size)
            if self._bytes + size > self.bytes_limit:
                break
            block.taps = sums[0]
            self._bytes += size
            richer.append(block)
        return richer

    def _root(self, salt: bytes) -> Root:
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Root(salt, self.identity.root(salt, self.block_tokens))
        return root

    def _remove(self, block: Block) -> None:
        """A leaf that is not in the list any more."""
        parent = block.parent
        del parent.children[block.tokens]
        self._blocks -= 1
        self._bytes -= self._size(block)
        self._evicted += self.block_tokens
        if isinstance(parent, Root) and not parent.children:
            del self._roots[parent.salt]
        if self.on_event is not None:
            self.on_event(BlockRemoved([block.name], MEMORY))

    def _size(self, block: Block) -> int:
        return self._bare_block_bytes + (0 if block.taps is None else self.identity.layout.tap_bytes)

    def _tell_stored(self, salt: bytes, added: list[Block]) -> None:
        if self.on_event is not None:
            self.on_event(self._stored_event(salt, added))

    def _stored_event(self, salt: bytes, added: list[Block]) -> BlockStored:
        parent = added[0].parent
        return BlockStored(
            [block.name for block in added],
            parent.name if isinstance(parent, Block) else None,
            array("I", b"".join(block.tokens for block in added)).tolist(),
            self.block_tokens,
            medium=MEMORY,
            lora_name=self.identity.adapter or None,
            salt=salt.decode(errors="replace"),
        )
