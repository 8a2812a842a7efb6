"""One step over the rows of `kv_rows.py`: how its tokens are packed, stored and attended to."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from local_engine import chunks
from local_engine.kv import KVShape, Span
from local_engine.rows_pool import Pool, Row
from local_engine.simd import address

BATCHED_SPAN: Final = 16
"""Most tokens of a span that is attended to together with its neighbours: decode and verify, not prefill."""

LONGEST_SPAN: Final = 256
"""As above, for our own kernels, which take all of a step's spans together."""

MOST_TOGETHER: Final = 64
"""Tokens that our kernels attend to at once, so that there is little memory for their scores, and it stays in caches:
two spans of 128 after 1900 tokens took 11 ms together, and take 6.5."""


_PARTS_EACH: Final = 2
"""Parts that each thread has to attend to, so that others can take one of them."""
_TOKEN_COST: Final = 32
"""What a token's turn and sums cost, in keys that are read."""


class _Group:
    """Neighbouring rows of one pool that compute the same number of tokens in a step: one call per layer."""

    def __init__(self, shape: KVShape, members: Sequence[tuple[Span, Row]], offset: int) -> None:
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

    def __init__(self, shape: KVShape, members: Sequence[tuple[Span, Row]]) -> None:
        self._shape = shape
        places = [(row.index, span.start + at) for span, row in members for at in range(span.tokens)]
        self._places = torch.tensor(places).t().contiguous()
        longest = max(position for _, position in places) + 1
        self._scores = torch.empty(chunks.scores_room(len(places), shape.query_heads, longest, shape.head_dim))
        self._kernel = chunks.attend(shape.head_dim, shape.query_heads // shape.kv_heads, shape.dtype)

    def run(
        self, pool: Pool, layer: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
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
            0,
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
    """GROUP_WORDS for each run of tokens of one pool, of MOST_TOGETHER at most."""

    @classmethod
    def of(cls, packed: Sequence[tuple[Span, Row]]) -> "Reading":
        """Good until a pool is resized."""
        rows, positions, groups = array("q"), array("q"), array("q")
        last: Pool | None = None
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
        return cls(rows, positions, groups if len(rows) <= MOST_TOGETHER else _split(groups))

    def shared_out(self, threads: int, together: int) -> "Shared":
        """In parts for so many threads, of as much to read each: of whole rows, in groups of `together` tokens at
        most."""
        if threads == 1:
            return Shared.of(self)
        cut = (sum(self.positions) + _TOKEN_COST * len(self.positions)) / (_PARTS_EACH * threads)
        groups, parts, spent = array("q"), array("q", [0]), 0
        before = (0, -1)
        for at in range(0, len(self.groups), GROUP_WORDS):
            first, tokens, held, addresses = self.groups[at : at + GROUP_WORDS]
            room = 0
            for token in range(first, first + tokens):
                place = addresses, self.rows[token]
                if spent >= cut and place != before:
                    parts.append(len(groups) // GROUP_WORDS)
                    room = spent = 0
                if not room:
                    groups.extend((token, 0, held, addresses))
                    room = together
                groups[GroupWord.TOKENS - GROUP_WORDS] += 1
                room -= 1
                spent += self.positions[token] + _TOKEN_COST
                before = place
        parts.append(len(groups) // GROUP_WORDS)
        return Shared(self, groups, parts)


@dataclass(frozen=True, slots=True)
class Shared:
    """What threads attend to at the same time."""

    reading: Reading
    groups: "array[int]"
    """As the reading's."""
    parts: "array[int]"
    """Where each part of the groups begins, and the last one ends."""

    @classmethod
    def of(cls, reading: Reading) -> "Shared":
        """In one part."""
        return cls(reading, reading.groups, array("q", [0, len(reading.groups) // GROUP_WORDS]))


def _split(groups: "array[int]") -> "array[int]":
    """Runs of MOST_TOGETHER tokens at most."""
    found = array("q")
    for at in range(0, len(groups), GROUP_WORDS):
        first, tokens, held, addresses = groups[at : at + GROUP_WORDS]
        for done in range(0, tokens, MOST_TOGETHER):
            found.extend((first + done, min(tokens - done, MOST_TOGETHER), held, addresses))
    return found


class RowsPlan:
    """StepPlan over rows."""

    def __init__(self, shape: KVShape, spans: Sequence[Span], rows: Sequence[Row]) -> None:
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
        run: list[tuple[Span, Row]] = []
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


def _joins(left: tuple[Span, Row], right: tuple[Span, Row]) -> bool:
    (before, row), (after, next_row) = left, right
    return (
        before.tokens == after.tokens <= BATCHED_SPAN and row.pool is next_row.pool and row.index + 1 == next_row.index
    )


def _has_amx() -> bool:
    """With matrix tiles, torch's grouped-query bf16 kernel beats folding the heads; without, it is 5 times slower."""
    return bool(torch.cpu._is_amx_tile_supported())
