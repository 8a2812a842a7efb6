"""Keys and values on CPU: every sequence is a row whose place follows from its index, because gathering pages costs
several times the attention itself there.

Rows of one capacity live side by side in a pool, without holes, so that decode rows are attended to in one call per
pool and layer. Capacities double, which bounds the unused part. For our own kernels a pool holds the first tokens of
all its rows, then the next ones, chunk by chunk: what a step reads lies end to end (`kernels.attend`). For torch's,
which want a row's tokens at equal distances, a chunk is the whole row, and rows are padded to the longest of them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cached_property
from itertools import count
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from local_engine import chunks, kernels
from local_engine.kv import KVFull, KVShape, Span, check_blocks, check_range, check_spans
from local_engine.pages import zeros
from local_engine.simd import LANES, Kernel, address

SMALLEST_ROW: Final = 256
"""Tokens. Smaller rows would save little memory and split the decode rows of short chats over more calls."""
BATCHED_SPAN: Final = 16
"""Most tokens of a span that is attended to together with its neighbours: decode and verify, not prefill."""

LONGEST_SPAN: Final = 128
"""As above, for our own kernels, which take all of a step's spans together."""


class _Pool:
    """Rows of one capacity: a tensor [2 (key, value), chunks, rows, kv_heads, chunk, head_dim] per layer."""

    def __init__(self, shape: KVShape, capacity: int, chunk: int | None) -> None:
        """`chunk` tokens of a row and head lie side by side, for our own kernels; None: all of them, for torch's."""
        self.capacity = capacity
        self.chunk = chunk or capacity
        self.in_chunks = chunk is not None
        self.rows = 0  # allocated; the first len(members) are in use
        self.members: list[_Row] = []
        self._chunks = capacity // self.chunk
        self._size = (shape.kv_heads, self.chunk, shape.head_dim)
        self.layers = [torch.empty(2, self._chunks, 0, *self._size, dtype=shape.dtype) for _ in range(shape.layers)]
        self.addresses = array("q")
        """Of each layer's keys, then its values."""

    def resize(self, rows: int) -> None:
        """One layer after the other, so that no more than one layer is ever held twice."""
        kept = min(rows, len(self.members))
        for index, old in enumerate(self.layers):
            # Zeros, never whatever the memory held: a masked key may be anything but NaN.
            new = zeros((2, self._chunks, rows, *self._size), old.dtype)
            new[:, :, :kept] = old[:, :, :kept]
            self.layers[index] = new
        self.addresses = array("q", [part.data_ptr() for layer in self.layers for part in layer])
        self.rows = rows

    def copy(self, source: "_Row", target: int, length: int) -> None:
        """Copy the first `length` tokens of `source`, a row of any pool, to row `target` of this one."""
        tokens = min(length, self.chunk, source.pool.chunk)
        whole = -(-length // self.chunk)
        for mine, theirs in zip(self.layers, source.pool.layers, strict=True):
            mine[:, :whole, target, :, :tokens] = theirs[:, :whole, source.index, :, :tokens]

    def read(self, layer: Tensor, rows: slice, stop: int) -> Tensor:
        """The first tokens of some rows in one of `layers`: [2 (key, value), rows, kv_heads, stop, head_dim]."""
        parts = layer[:, : -(-stop // self.chunk), rows].permute(0, 2, 3, 1, 4, 5)
        return parts.flatten(3, 4)[:, :, :, :stop]

    def write(self, layer: Tensor, row: int, start: int, data: Tensor) -> None:
        """Put tokens [2 (key, value), kv_heads, tokens, head_dim] into a row from `start` on."""
        done = 0
        while done < data.shape[2]:
            index, within = divmod(start + done, self.chunk)
            whole = (data.shape[2] - done) // self.chunk if within == 0 else 0
            if whole:
                parts = data[:, :, done : done + whole * self.chunk]
                parts = parts.reshape(2, parts.shape[1], whole, self.chunk, parts.shape[3])
                layer[:, index : index + whole, row] = parts.transpose(1, 2)
                done += whole * self.chunk
            else:
                count = min(self.chunk - within, data.shape[2] - done)
                layer[:, index, row, :, within : within + count] = data[:, :, done : done + count]
                done += count

    def remove(self, row: "_Row") -> None:
        """The last row moves into the hole."""
        last = self.members.pop()
        if last is not row:
            self.copy(last, row.index, last.length)
            last.index = row.index
            self.members[last.index] = last


@dataclass(slots=True, eq=False)
class _Row:
    pool: _Pool
    index: int
    length: int


class RowsKV:
    """KVCache of contiguous rows. Capacities are rounded up to SMALLEST_ROW times a power of two, at most the chunks
    that the context fills.

    `bytes_limit` bounds what is allocated, spare rows included. While a pool is resized, one layer of it comes on top;
    while a row grows, its tokens do.
    """

    def __init__(self, shape: KVShape, bytes_limit: int) -> None:
        self.shape = shape
        self.bytes_limit = bytes_limit
        self.token_bytes = shape.token_bytes
        self._pools: dict[int, _Pool] = {}
        self._rows: dict[int, _Row] = {}
        self._slots = count()
        self._chunk: int | None = None
        self._export: Kernel | None = None
        if shape.head_dim % LANES == 0 and kernels.usable(shape.dtype, shape.device):
            self._chunk = chunks.chunk_tokens(shape.head_dim, shape.dtype)
            self._export = chunks.export(shape.head_dim, shape.dtype)

    @property
    def bytes_used(self) -> int:
        return self.token_bytes * sum(len(pool.members) * pool.capacity for pool in self._pools.values())

    @property
    def bytes_allocated(self) -> int:
        return self.token_bytes * sum(pool.rows * pool.capacity for pool in self._pools.values())

    def open(self, capacity: int) -> int:
        rounded = self._rounded(capacity)
        self._check_budget(rounded)
        slot = next(self._slots)
        self._rows[slot] = self._new_row(rounded)
        return slot

    def reserve(self, slot: int, length: int) -> None:
        row = self._rows[slot]
        if length <= row.pool.capacity:
            return
        capacity = self._rounded(length)
        self._check_budget(capacity - row.pool.capacity)
        # Out and in again, so that the old row's memory counts for the new one.
        held = self.export(slot, 0, row.length)
        row.pool.remove(row)
        self._rows[slot] = self._new_row(capacity)
        self.load(slot, 0, held)

    def length(self, slot: int) -> int:
        return self._rows[slot].length

    def truncate(self, slot: int, length: int) -> None:
        check_range(self._rows[slot].length, 0, length)
        self._rows[slot].length = length

    def commit(self, slot: int, length: int) -> None:
        self._rows[slot].length = length

    def fork(self, slot: int, length: int) -> int:
        check_range(self._rows[slot].length, 0, length)
        forked = self.open(length)
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

    def plan(self, spans: Sequence[Span]) -> "RowsPlan":
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

    def _check_budget(self, tokens: int) -> None:
        free = self.bytes_limit - self.bytes_used
        if tokens * self.token_bytes > free:
            raise KVFull(
                f"{tokens} tokens more need {tokens * self.token_bytes} bytes; {free} of the {self.bytes_limit} bytes"
                " for keys and values are free"
            )

    def _new_row(self, capacity: int) -> _Row:
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = _Pool(self.shape, capacity, self._chunk)
        if len(pool.members) == pool.rows:
            self._grow(pool)
        row = _Row(pool, len(pool.members), 0)
        pool.members.append(row)
        return row

    def _grow(self, pool: _Pool) -> None:
        """By half of its rows; when the budget is short, by one row after the other pools gave up their spare ones."""
        free = (self.bytes_limit - self.bytes_allocated) // (pool.capacity * self.token_bytes)
        if free < 1:
            for other in self._pools.values():
                if other.rows > len(other.members):
                    other.resize(len(other.members))
            free = 1
        pool.resize(pool.rows + min(free, 1 + pool.rows // 2))


class _Group:
    """Neighbouring rows of one pool that compute the same number of tokens in a step: one call per layer."""

    def __init__(self, shape: KVShape, members: Sequence[tuple[Span, _Row]], offset: int) -> None:
        first = members[0][1]
        self.pool = first.pool
        self.rows = len(members)
        self.count = members[0][0].tokens
        self.tokens = slice(offset, offset + self.rows * self.count)
        self._starts = [span.start for span, _ in members]
        self._longest = max(self._starts) + self.count
        self._shape = shape
        self._row = first.index
        self._heads_per_kv = shape.query_heads // shape.kv_heads
        self._batched = self.count <= BATCHED_SPAN
        self._kernel = _KernelAttention(shape, members) if self._batched and self.pool.in_chunks else None
        self._folded = self._batched and not (shape.dtype == torch.bfloat16 and _has_amx())
        self._targets = self._target_indexes() if self._kernel is None else torch.empty(0)
        self._masks: dict[int | None, Tensor | None] = {}

    def run(self, layer: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """StepPlan.attend for this group's tokens."""
        if self._kernel is not None:
            return self._kernel.run(self.pool, layer, query, key, value, scale, window)
        self._store(layer, key, value)
        return self._attend(layer, query, scale, window)

    def _store(self, layer: Tensor, key: Tensor, value: Tensor) -> None:
        dim = self._shape.head_dim
        keys, values = layer.view(2, -1, dim).unbind()
        keys.index_copy_(0, self._targets, key.reshape(-1, dim))
        values.index_copy_(0, self._targets, value.reshape(-1, dim))

    def _attend(self, layer: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
        """query and result [rows * count, query_heads, head_dim]."""
        shape, count, rows = self._shape, self.count, self.rows
        keys, values = self.pool.read(layer, slice(self._row, self._row + rows), self._longest)
        mask = self._mask(window)
        if not self._folded:
            heads_first = query.reshape(rows, count, shape.query_heads, shape.head_dim).transpose(1, 2)
            out = scaled_dot_product_attention(
                heads_first,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and count > 1,
                scale=scale,
                enable_gqa=self._heads_per_kv > 1,
            )
            return out.transpose(1, 2).reshape(-1, shape.query_heads, shape.head_dim)
        # The query heads that share a key head become rows of one small product.
        if count > 1:
            query = query.view(rows, count, shape.kv_heads, self._heads_per_kv, shape.head_dim).transpose(1, 2)
        query = query.reshape(rows, shape.kv_heads, count * self._heads_per_kv, shape.head_dim)
        if rows == 1:
            out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        else:
            out = _attend_rows(query, keys, values, mask, scale)
        if count > 1:
            out = out.view(rows, shape.kv_heads, count, self._heads_per_kv, shape.head_dim).transpose(1, 2)
        return out.reshape(-1, shape.query_heads, shape.head_dim)

    def _target_indexes(self) -> Tensor:
        """Where each packed (token, kv head) goes in a layer's keys seen as [all places, head_dim]."""
        heads, pool = self._shape.kv_heads, self.pool
        rows = torch.arange(self._row, self._row + self.rows).view(-1, 1, 1)
        tokens = torch.tensor(self._starts).view(-1, 1, 1) + torch.arange(self.count).view(1, -1, 1)
        lines = (tokens // pool.chunk * pool.rows + rows) * heads + torch.arange(heads)
        return (lines * pool.chunk + tokens % pool.chunk).flatten()

    def _mask(self, window: int | None) -> Tensor | None:
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        """What is added to the scores: [rows, 1, count (times heads when folded), longest], None if nothing is hidden.

        Causal from the lower right: SDPA's own `is_causal` counts from the upper left, so it is right only for a
        span that starts at 0.
        """
        if window is not None and window >= self._longest:
            return self._mask(None)
        if window is None and not self._folded and self._longest == self.count:
            return None
        if window is None and self.count == 1 and min(self._starts) == max(self._starts):
            return None
        place = torch.tensor(self._starts).view(-1, 1, 1) + torch.arange(self.count).view(1, -1, 1)
        seen = torch.arange(self._longest)
        hidden = seen > place if window is None else (seen > place) | (seen <= place - window)
        mask = torch.zeros(hidden.shape, dtype=self._shape.dtype).masked_fill_(hidden, -torch.inf)
        return (mask.repeat_interleave(self._heads_per_kv, 1) if self._folded and self.count > 1 else mask).unsqueeze(1)


class _KernelAttention:
    """Decode and verify by our own kernel, where it is for this engine."""

    def __init__(self, shape: KVShape, members: Sequence[tuple[Span, _Row]]) -> None:
        self._shape = shape
        places = [(row.index, span.start + at) for span, row in members for at in range(span.tokens)]
        self._places = torch.tensor(places).t().contiguous()
        longest = max(position for _, position in places) + 1
        self._scores = torch.empty(chunks.scores_room(len(places), shape.query_heads, longest, shape.head_dim))
        self._kernel = chunks.attend(shape.head_dim, shape.query_heads // shape.kv_heads, shape.dtype)

    def run(
        self, pool: _Pool, layer: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        shape = self._shape
        query, key, value = (_with_whole_heads(tensor) for tensor in (query, key, value))
        out = query.new_empty(query.shape)
        rows, positions = self._places
        self._kernel(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            layer[0].data_ptr(),
            layer[1].data_ptr(),
            out.data_ptr(),
            rows.data_ptr(),
            positions.data_ptr(),
            self._scores.data_ptr(),
            query.shape[0],
            shape.kv_heads,
            pool.rows,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            scale,
            window or shape.context,
        )
        return out


def _with_whole_heads(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] with the heads of a token side by side."""
    whole = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if whole else tensor.contiguous()


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA for few queries per key head, [rows, kv_heads, queries, head_dim], in two batched products.

    Keys first, so that the product runs along what has to be read: 1.3 (float32) to 2 (bfloat16) times faster than
    torch's flash kernel, whose blocks are made for many queries.
    """
    rows, heads, queries, dim = query.shape
    scores = torch.bmm(keys.flatten(0, 1), (query * scale).view(-1, queries, dim).transpose(1, 2))
    scores = scores.transpose(1, 2).contiguous()
    if mask is not None:
        scores.view(rows, heads, queries, -1).add_(mask)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(query.shape)


class GroupWord(IntEnum):
    """The words of neighbouring tokens whose keys are in one pool, as `Reading.groups` has them."""

    FIRST = 0
    TOKENS = auto()
    HELD = auto()
    """Rows of the pool."""
    ADDRESSES = auto()


GROUP_WORDS: Final = len(GroupWord)


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the packed tokens of a step go and what they attend to, in words for a kernel."""

    rows: "array[int]"
    """Of each token, in its pool."""
    positions: "array[int]"
    groups: "array[int]"
    """GROUP_WORDS for each run of tokens of one pool."""

    @classmethod
    def of(cls, packed: Sequence[tuple[Span, _Row]]) -> "Reading":
        """Good until a pool is resized."""
        rows, positions, groups = array("q"), array("q"), array("q")
        last: _Pool | None = None
        for (_, start, tokens), row in packed:
            pool = row.pool
            if pool is not last:
                groups.extend((len(rows), 0, pool.rows, address(pool.addresses)))
                last = pool
            if tokens == 1:
                rows.append(row.index)
                positions.append(start)
            else:
                rows.extend([row.index] * tokens)
                positions.extend(range(start, start + tokens))
            groups[GroupWord.TOKENS - GROUP_WORDS] += tokens
        return cls(rows, positions, groups)


class RowsPlan:
    """StepPlan over rows."""

    def __init__(self, shape: KVShape, spans: Sequence[Span], rows: Sequence[_Row]) -> None:
        places = sorted(
            (span.tokens, row.pool.capacity, row.index, at)
            for at, (span, row) in enumerate(zip(spans, rows, strict=True))
        )
        self.order: Sequence[int] = [place[3] for place in places]
        self._shape = shape
        self._packed = [(spans[at], rows[at]) for at in self.order]

    @cached_property
    def reading(self) -> "Reading | None":
        """What our own kernels need to attend to all tokens of the step; None where some span is too long for them."""
        span, row = self._packed[-1]
        if span.tokens > LONGEST_SPAN or not row.pool.in_chunks:  # the longest come last
            return None
        return Reading.of(self._packed)

    @cached_property
    def _groups(self) -> "list[_Group]":
        groups: list[_Group] = []
        run: list[tuple[Span, _Row]] = []
        offset = 0
        for member in self._packed:
            if run and not _joins(run[-1], member):
                groups.append(_Group(self._shape, run, offset))
                offset = groups[-1].tokens.stop
                run = []
            run.append(member)
        return [*groups, _Group(self._shape, run, offset)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        parts = []
        for group in self._groups:
            held = group.pool.layers[layer]
            own = group.tokens
            parts.append(group.run(held, query[own], key[own], value[own], scale, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joins(left: tuple[Span, _Row], right: tuple[Span, _Row]) -> bool:
    (before, row), (after, next_row) = left, right
    return (
        before.tokens == after.tokens <= BATCHED_SPAN and row.pool is next_row.pool and row.index + 1 == next_row.index
    )


def _has_amx() -> bool:
    """With matrix tiles, torch's grouped-query bf16 kernel beats folding the heads; without, it is 5 times slower."""
    return bool(torch.cpu._is_amx_tile_supported())
