"""Keys and values on CPU: every sequence is a row whose place follows from its index, because gathering pages costs
several times the attention itself there.

Rows of one capacity live side by side in a pool, without holes, so that decode rows are attended to in one call per
pool and layer. Capacities double, which bounds the unused part. For our own kernels a pool holds the first tokens of
all its rows, then the next ones, chunk by chunk: what a step reads lies end to end (`chunks.attend`). For torch's,
which want a row's tokens at equal distances, a chunk is the whole row, and rows are padded to the longest of them.
"""

from array import array
from collections.abc import Sequence
from itertools import count
from typing import Final

import torch
from torch import Tensor

from local_engine import chunks, kernels
from local_engine.kv import KVFull, KVShape, Span, check_blocks, check_range, check_spans
from local_engine.rows_plan import RowsPlan
from local_engine.rows_pool import Pool, Row
from local_engine.simd import LANES, Kernel, address

SMALLEST_ROW: Final = 256
"""Tokens. Smaller rows would save little memory and split the decode rows of short chats over more calls."""

_PLENTY: Final = 0.75
"""Of the limit, which rows that are yet to grow may take: who comes next finds room without waiting for copies."""


class RowsKV:
    """KVCache of contiguous rows. Capacities are rounded up to SMALLEST_ROW times a power of two, at most the chunks
    that the context fills.

    `bytes_limit` bounds what is allocated, spare rows included. While a pool is resized, one layer of it comes on top;
    while a row grows, its tokens do.

    A row that is expected to grow gets its last capacity at once while there is memory, of which it takes only what it
    has written: eight rows that outgrew theirs in the same step were waited for up to a second. When memory is short,
    such rows are cut to what they have been asked to hold.
    """

    def __init__(self, shape: KVShape, bytes_limit: int) -> None:
        self.shape = shape
        self.bytes_limit = bytes_limit
        self.token_bytes = shape.token_bytes
        self._pools: dict[int, Pool] = {}
        self._rows: dict[int, Row] = {}
        self._slots = count()
        self._chunk: int | None = None
        self._export: Kernel | None = None
        if shape.head_dim % LANES == 0 and kernels.usable(shape.dtype, shape.device):
            self._chunk = chunks.chunk_tokens(shape.head_dim, shape.dtype)
            self._export = chunks.export(shape.head_dim, shape.dtype)

    @property
    def in_chunks(self) -> bool:
        """Whether rows are held for our own kernels."""
        return self._chunk is not None

    @property
    def bytes_used(self) -> int:
        """Without what rows would give back to others."""
        return self.token_bytes * sum(self._rounded(row.asked) for row in self._rows.values())

    @property
    def bytes_allocated(self) -> int:
        return self.token_bytes * sum(pool.rows * pool.capacity for pool in self._pools.values())

    @property
    def most_tokens(self) -> int:
        most, row = 0, self._rounded(1)
        while row > most and row * self.token_bytes <= self.bytes_limit:
            most, row = row, self._rounded(min(2 * row, self.shape.context))
        return min(most, self.shape.context)

    def open(self, capacity: int, expected: int = 0) -> int:
        rounded = self._rounded(capacity)
        if self.in_chunks and expected > rounded:  # torch's rows are filled with zeros, all of them
            whole = self._rounded(expected)
            if (self._tokens() + whole) * self.token_bytes <= _PLENTY * self.bytes_limit:
                rounded = whole
        self._find_room(rounded)
        slot = next(self._slots)
        self._rows[slot] = self._new_row(rounded)
        self._rows[slot].asked = capacity
        return slot

    def reserve(self, slot: int, length: int) -> None:
        row = self._rows[slot]
        if length > row.pool.capacity:
            capacity = self._rounded(length)
            self._find_room(capacity, row)
            self._move(slot, capacity)
            row = self._rows[slot]
        row.asked = max(row.asked, length)

    def length(self, slot: int) -> int:
        return self._rows[slot].length

    def truncate(self, slot: int, length: int) -> None:
        check_range(self._rows[slot].length, 0, length)
        self._rows[slot].length = length

    def commit(self, slot: int, length: int) -> None:
        self._rows[slot].length = length

    def fork(self, slot: int, length: int, expected: int = 0) -> int:
        check_range(self._rows[slot].length, 0, length)
        forked = self.open(length, expected)
        row = self._rows[forked]
        row.pool.copy(self._rows[slot], row.index, length)
        row.length = length
        return forked

    def close(self, slot: int) -> None:
        row = self._rows.pop(slot)
        row.pool.remove(row)

    def export(self, slot: int, start: int, stop: int) -> Tensor:
        row = self._rows[slot]
        check_range(row.length, start, stop)
        rows = slice(row.index, row.index + 1)
        return torch.stack([row.pool.read(layer, rows, stop)[:, 0, :, start:] for layer in row.pool.layers])

    def export_into(self, slot: int, start: int, blocks: Sequence[Tensor]) -> None:
        row, tokens = self._rows[slot], check_blocks(self.shape, blocks)
        stop = start + len(blocks) * tokens
        check_range(row.length, start, stop)
        places = array("q", [block.data_ptr() for block in blocks])
        if self._export is not None and not any(place % kernels.LINE for place in places):
            self._export(
                address(row.pool.addresses),
                address(places),
                len(blocks),
                2 * self.shape.layers,
                self.shape.kv_heads,
                tokens,
                row.index,
                start,
                row.pool.rows,
            )
            return
        for block, part in zip(blocks, torch.split(self.export(slot, start, stop), tokens, dim=3), strict=True):
            block.copy_(part)

    def load(self, slot: int, start: int, data: Tensor) -> None:
        if start != self._rows[slot].length:
            raise ValueError(f"slot {slot} holds {self._rows[slot].length} tokens; data for {start} does not follow")
        stop = start + data.shape[3]
        self.reserve(slot, stop)
        row = self._rows[slot]
        for layer, part in zip(row.pool.layers, data, strict=True):
            row.pool.write(layer, row.index, start, part)
        row.length = stop

    def plan(self, spans: Sequence[Span]) -> RowsPlan:
        check_spans(self, spans)
        rows = [self._rows[span.slot] for span in spans]
        for span, row in zip(spans, rows, strict=True):
            if span.start + span.tokens > row.pool.capacity:
                raise ValueError(
                    f"slot {span.slot} has no room for {span.start + span.tokens} tokens; reserve it first"
                )
        return RowsPlan(self.shape, spans, rows)

    def _rounded(self, capacity: int) -> int:
        if capacity > self.shape.context:
            raise ValueError(f"{capacity} tokens are asked for; the model's context is {self.shape.context}")
        rounded = SMALLEST_ROW
        while rounded < capacity:
            rounded *= 2
        whole = self._chunk or 1
        return min(rounded, -(-self.shape.context // whole) * whole)

    def _tokens(self) -> int:
        """That rows have room for, with what they would give back."""
        return sum(len(pool.members) * pool.capacity for pool in self._pools.values())

    def _find_room(self, capacity: int, growing: Row | None = None) -> None:
        """For a row, in place of one that grows. Raises KVFull, and no row is another one then."""
        more = capacity - (self._rounded(growing.asked) if growing else 0)
        free = self.bytes_limit - self.bytes_used
        if more * self.token_bytes > free:
            raise KVFull(
                f"{more} tokens more need {more * self.token_bytes} bytes; {free} of the {self.bytes_limit} bytes"
                " for keys and values are free"
            )
        missing = self._tokens() + capacity - (growing.pool.capacity if growing else 0)
        missing -= self.bytes_limit // self.token_bytes
        for slot, row in self._rows.items():
            kept = self._rounded(row.asked)
            if missing > 0 and row is not growing and kept < row.pool.capacity:
                missing -= row.pool.capacity - kept
                self._move(slot, kept)

    def _move(self, slot: int, capacity: int) -> None:
        """To a row of another capacity: out and in again, so that the old row's memory counts for the new one."""
        row = self._rows[slot]
        held = self.export(slot, 0, row.length)
        row.pool.remove(row)
        try:
            self._rows[slot] = self._new_row(capacity)
        except torch.OutOfMemoryError:
            self._rows[slot] = self._new_row(row.pool.capacity)
            raise
        finally:
            self._rows[slot].asked = row.asked
            self.load(slot, 0, held)

    def _new_row(self, capacity: int) -> Row:
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = Pool(self.shape, capacity, self._chunk)
        if len(pool.members) == pool.rows:
            self._grow(pool)
        return pool.add()

    def _grow(self, pool: Pool) -> None:
        """By half of its rows; when the budget is short, by one row after the other pools gave up their spare ones."""
        free = (self.bytes_limit - self.bytes_allocated) // (pool.capacity * self.token_bytes)
        if free < 1:
            for other in self._pools.values():
                if other.rows > len(other.members):
                    other.resize(len(other.members))
            free = 1
        pool.resize(pool.rows + min(free, 1 + pool.rows // 2))
