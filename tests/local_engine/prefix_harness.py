"""KV that can be told apart: the values at each token depend on the tenant and on all tokens up to it."""

import threading
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import torch

from local_engine.prefix import Export, PrefixStore, Taps
from local_engine.prefix_block import Block
from local_engine.prefix_format import encode
from local_engine.prefix_identity import KVIdentity, KVLayout
from local_engine.prefix_tiers import SlowTiers
from local_engine.prefix_types import KVEvent

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, tap_layers=(1, 2), width=3)
IDENTITY = KVIdentity(model="m", weights="w", layout=LAYOUT)
BLOCK = 4
BLOCK_BYTES = LAYOUT.kv_bytes(BLOCK) + BLOCK * 4 + 1024
AMPLE_S = 60.0
"""A deadline that no test reaches."""


def new_store(
    blocks: int = 100,
    *,
    events: list[KVEvent] | None = None,
    identity: KVIdentity = IDENTITY,
    slow: SlowTiers | None = None,
) -> PrefixStore:
    """Room for `blocks` blocks without taps."""
    return PrefixStore(
        identity,
        bytes_limit=blocks * BLOCK_BYTES,
        block_tokens=BLOCK,
        slow=slow,
        on_event=events.append if events is not None else None,
    )


def _rows(kind: bytes, salt: bytes, tokens: Sequence[int], size: int) -> torch.Tensor:
    digest = blake2b(kind + salt)
    rows = []
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
        rows.append(int.from_bytes(digest.digest()[:3], "little"))
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 1) + torch.arange(size)


def kv_of(salt: bytes, tokens: Sequence[int], layout: KVLayout = LAYOUT) -> torch.Tensor:
    """What computing `tokens` for the tenant gives: [layers, 2, kv_heads, tokens, head_dim]."""
    width = layout.layers * 2 * layout.kv_heads * layout.head_dim
    rows = _rows(b"kv", salt, tokens, width).to(layout.dtype)
    return rows.reshape(len(tokens), layout.layers, 2, layout.kv_heads, layout.head_dim).permute(1, 2, 3, 0, 4)


def taps_of(salt: bytes, tokens: Sequence[int]) -> torch.Tensor:
    """[tap_layers, tokens, width]"""
    rows = _rows(b"taps", salt, tokens, len(LAYOUT.tap_layers) * LAYOUT.width)
    return rows.reshape(len(tokens), len(LAYOUT.tap_layers), LAYOUT.width).permute(1, 0, 2)


class Computed:
    """A finished prefill of `tokens`; remembers what it was asked to copy out."""

    def __init__(self, salt: bytes, tokens: Sequence[int]) -> None:
        self._kv = kv_of(salt, tokens)
        self._taps = taps_of(salt, tokens)
        self.exported: list[tuple[int, int]] = []

    def export(self, start: int, blocks: Sequence[torch.Tensor]) -> None:
        stop = start + len(blocks) * BLOCK
        self.exported.append((start, stop))
        for block, part in zip(blocks, torch.split(self._kv[:, :, :, start:stop], BLOCK, dim=3), strict=True):
            block.copy_(part)

    def taps(self, start: int, stop: int) -> torch.Tensor | None:
        rows = self._taps[:, start * BLOCK : stop * BLOCK]
        return rows.reshape(len(rows), stop - start, BLOCK, -1).sum(2).transpose(0, 1)


def commit(store: PrefixStore, salt: bytes, tokens: Sequence[int], *, taps: bool = False) -> list[tuple[int, int]]:
    """Store what computing `tokens` gives; what was copied out for it."""
    computed = Computed(salt, tokens)
    export: Export = computed.export
    rows: Taps | None = computed.taps if taps else None
    store.commit(salt, tokens, export, rows)
    return computed.exported


class Row:
    """One sequence's KV, contiguous, as a row of a `KVCache`."""

    def __init__(self) -> None:
        self.data = kv_of(b"", [])

    def load(self, slot: int, start: int, data: torch.Tensor) -> None:
        assert start == self.data.shape[3], "KV is written at the end"
        self.data = torch.cat([self.data, data], dim=3)


def matched(store: PrefixStore, salt: bytes, tokens: Sequence[int]) -> int:
    """Tokens that are matched; what is loaded for them must be what computing them gives."""
    with store.lookup(salt, tokens) as match:
        row = Row()
        match.load(row, 0)
        assert torch.equal(row.data, kv_of(salt, tokens[: match.tokens]))
        return match.tokens


def fetched(store: PrefixStore, salt: bytes, tokens: Sequence[int]) -> int:
    """Tokens matched once the slower tiers have been asked; none of them wrong."""
    fetch = store.prefetch(salt, tokens)
    if fetch is not None:
        fetch.wait()
        assert fetch.finished
    count = matched(store, salt, tokens)
    assert store.problems() == []
    return count


def stored_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("leadline-kv-1/*/*"))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class GatedTier:
    """Lets each call pass when told; what it holds is one prefix, or it fails."""

    medium = "gated"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.calls: list[str] = []
        self.blocks: dict[bytes, bytes] = {}
        self.error: OSError | None = None

    def may_have(self, root: bytes, digest: bytes) -> bool:
        return True

    def read(self, root: bytes, digests: Sequence[bytes]) -> list[bytes]:
        self._pass("read")
        found = []
        for digest in digests:
            if digest not in self.blocks:
                break
            found.append(self.blocks[digest])
        return found

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        for block in path:
            self._pass("write")
            self.blocks[block.digest] = encode(block)
            yield

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        self._pass("forget")
        for digest in digests if digests is not None else list(self.blocks):
            self.blocks.pop(digest, None)

    def close(self) -> None:
        pass

    def _pass(self, call: str) -> None:
        self.calls.append(call)
        self.entered.set()
        assert self.gate.wait(AMPLE_S)
        if self.error is not None:
            raise self.error
