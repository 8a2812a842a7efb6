"""Keys and values of many rows in chunks: how attention reads them, and how they are copied out.

As the kernels of `kernels.py`: what a row gives does not depend on the rows beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from local_engine.simd import F32, I64, LANES, PTR, Kernel, Sums, Writer

_SUMS: Final = 16
"""Vectors that attention sums up at once."""
_CHUNK_BYTES: Final = 8 << 10
"""Of one head's keys: while they are read, the next ones come to the first cache, which holds several times as many."""


def chunk_tokens(dim: int, dtype: torch.dtype) -> int:
    """How many tokens of one row and head `attend` wants side by side: a power of two."""
    fitting = _CHUNK_BYTES // (dim * dtype.itemsize)
    return max(LANES, 1 << fitting.bit_length() - 1)


@cache
def attend(dim: int, group: int, dtype: torch.dtype) -> Kernel:
    """(query, key, value, keys, values, out, rows, positions, scores, tokens, heads, first, last, held, query_stride,
    key_stride, value_stride, scale, window): all tokens store their keys and values of heads first to last - 1 of
    `heads`, and attend to them.

    keys, values [chunks, held rows, heads, `chunk_tokens`, dim]; `rows` and `positions` (int64) say where each token
    goes; it sees the `window` tokens up to itself. query has heads * group heads per token; out [tokens, heads * group,
    dim]; strides are elements per token; scores has room for `scores_room` float32.

    All rows' first chunks are read, then all their second ones: first the keys, then the values. So memory is read
    from end to end but for the rows' last chunks; rows one behind the other, each of which fills half of its place, are
    read 1.3 to 1.5 times slower.
    """
    w = Writer("attend", [PTR] * 9 + [I64] * 8 + [F32, I64])
    query, key, value, keys, values, out, rows, positions, scores = w.arguments[:9]
    tokens, heads, first, last, held, query_stride, key_stride, value_stride, scale, window = w.arguments[9:]
    own = first, last
    chunk = chunk_tokens(dim, dtype)
    longest = w.variable(w.whole(0))
    with w.loop(w.whole(0), tokens) as token:
        longest.value = w.greater(longest.value, w.add(w.load_int(positions, token), 1))
    most = w.times(w.add(w.part(longest.value, LANES), 2), LANES)
    seen = _Seen(
        rows, positions, tokens, heads, own, held, window, longest.value, scores, most, chunk, dim, group, dtype
    )
    with _chunks(w, seen) as block:
        _keep(w, seen, block, key, key_stride, keys)
        asked = w.add(w.times(block.token, query_stride), w.times(block.head, group * dim))
        _score(w, seen, block, keys, query, asked, scale)
    with _chunks(w, seen) as block:
        _keep(w, seen, block, value, value_stride, values)
        _soften(w, seen, block)
        _gather(w, seen, block, values)
    with w.loop(w.whole(0), tokens) as token, w.loop(w.times(first, group), w.times(last, group)) as head:
        told = w.times(w.add(w.times(token, w.times(heads, group)), head), dim)
        line = seen.line(w, token, head, 0)
        share = w.load(scores, w.add(line, seen.share), torch.float32)
        for at in range(0, dim, LANES):
            total = w.load(scores, w.add(line, seen.share, LANES + at), torch.float32)
            w.store(w.by(total, share), out, w.add(told, at), dtype)
    return w.compiled()


def scores_room(tokens: int, query_heads: int, longest: int, dim: int) -> int:
    """How many float32 `attend` needs for so many tokens, of which the last sees `longest`."""
    return tokens * query_heads * ((longest // LANES + 3) * LANES + dim)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the tokens of a step attend to, and where their scores go."""

    rows: Any
    positions: Any
    tokens: Any
    heads: Any
    own: tuple[Any, Any]
    """The first of the heads that are computed, and the first that is not any more."""
    held: Any
    window: Any
    longest: Any
    scores: Any
    """[tokens, heads * group]: a score per key; from `share` on what they are to be multiplied by, LANES times, then
    the sum of values so far."""
    share: Any
    chunk: int
    dim: int
    group: int
    dtype: torch.dtype

    def line(self, w: Writer, token: Any, head: Any, one: int) -> Any:
        """Where the scores of a token and query head begin; `one` more than the head."""
        return w.times(
            w.add(w.times(token, w.times(self.heads, self.group)), head, one), w.add(self.share, LANES + self.dim)
        )

    def place(self, w: Writer, token: Any, index: Any) -> Any:
        """Where a chunk of a token's row begins, in elements."""
        line = w.times(w.add(w.times(index, self.held), w.load_int(self.rows, token)), self.heads)
        return w.times(line, self.chunk * self.dim)


@dataclass(frozen=True, slots=True)
class _Block:
    """What one token sees of one chunk and head."""

    token: Any
    head: Any
    here: Any
    """Where it would begin if the chunk began at position 0, in elements."""
    ahead: Any
    """As `here`, of the block that is read next: its elements are fetched meanwhile."""
    begin: Any
    stop: Any
    """The first position of the chunk that it sees, and the first that it does not."""
    first: Any
    last: Any
    """The same of all chunks."""


@contextmanager
def _chunks(w: Writer, seen: _Seen) -> Iterator[_Block]:
    """The body runs for each chunk, token and head of which something is seen, in the order of memory."""
    chunk, size = seen.chunk, seen.chunk * seen.dim
    with (
        w.loop(w.whole(0), w.part(w.add(seen.longest, chunk - 1), chunk)) as index,
        w.loop(w.whole(0), seen.tokens) as token,
    ):
        last = w.add(w.load_int(seen.positions, token), 1)
        first = w.greater(w.minus(last, seen.window), w.whole(0))
        origin = w.times(index, chunk)
        begin, stop = w.greater(first, origin), w.lesser(last, w.add(origin, chunk))
        with w.where(begin, "<", stop):
            other = w.add(token, 1)
            more = w.either(other, "<", seen.tokens, w.whole(0), w.whole(1))
            following = w.either(other, "<", seen.tokens, other, w.whole(0))
            past = w.times(origin, seen.dim)
            base = w.minus(seen.place(w, token, index), past)
            beyond = w.minus(w.add(seen.place(w, following, w.add(index, more)), w.times(seen.own[0], size)), past)
            with w.loop(*seen.own) as head:
                here = w.add(base, w.times(head, size))
                ahead = w.either(w.add(head, 1), "<", seen.own[1], w.add(here, size), beyond)
                yield _Block(token, head, here, ahead, begin, stop, first, last)


def _keep(w: Writer, seen: _Seen, block: _Block, given: Any, stride: Any, kept: Any) -> None:
    """Store a token's own key or value when its chunk is read, before it is."""
    with w.where(block.stop, "==", block.last):
        source = w.add(w.times(block.token, stride), w.times(block.head, seen.dim))
        target = w.add(block.here, w.times(w.add(block.last, -1), seen.dim))
        for at in range(0, seen.dim, LANES):
            w.copy(given, w.add(source, at), kept, w.add(target, at), seen.dtype)


def _score(w: Writer, seen: _Seen, block: _Block, keys: Any, query: Any, asked: Any, scale: Any) -> None:
    """The block's scores, of each query head."""
    dim, dtype = seen.dim, seen.dtype
    factor = w.splat(scale)
    asking = [
        [w.by(w.load(query, w.add(asked, one * dim + at), dtype), factor) for at in range(0, dim, LANES)]
        for one in range(seen.group)
    ]
    first = w.times(block.head, seen.group)
    lines = [seen.line(w, block.token, first, one) for one in range(seen.group)]
    whole = w.variable(block.begin)

    def parts(place: Any) -> list[Any]:
        """For each query head the products with one key, yet to be summed up over the lanes."""
        here = w.add(block.here, w.times(place, dim))
        known = [w.load(keys, w.add(here, at), dtype) for at in range(0, dim, LANES)]
        w.prefetch(keys, w.add(block.ahead, w.times(place, dim)), dim, dtype)
        totals = []
        for asked_parts in asking:
            total = w.by(asked_parts[0], known[0])
            for part, known_part in zip(asked_parts[1:], known[1:], strict=True):
                total = w.fma(part, known_part, total)
            totals.append(total)
        return totals

    with w.loop(block.begin, w.add(block.stop, 1 - LANES), LANES) as place:
        sums = [Sums(w) for _ in range(seen.group)]
        for at in range(LANES):
            for tree, total in zip(sums, parts(w.add(place, at)), strict=True):
                tree.add(total)
        for line, tree in zip(lines, sums, strict=True):
            w.store(tree.all, seen.scores, w.add(line, place), torch.float32)
        whole.value = w.add(place, LANES)
    with w.loop(whole.value, block.stop) as place:
        for line, total in zip(lines, parts(place), strict=True):
            w.store_scalar(w.sum(total), seen.scores, w.add(line, place))


def _soften(w: Writer, seen: _Seen, block: _Block) -> None:
    """exp(score - greatest) in the scores' place, and what they are to be multiplied by to sum to one; no values yet.

    When a token's first values are read, so that memory does not wait meanwhile.
    """
    scores, f32 = seen.scores, torch.float32
    with w.where(block.begin, "==", block.first):
        for one in range(seen.group):
            line = seen.line(w, block.token, w.times(block.head, seen.group), one)
            w.store(w.number(float("-inf")), scores, w.add(line, block.last), f32)
            greatest = w.variable(w.number(float("-inf")))
            with w.loop(block.first, block.last, LANES) as at:
                greatest.value = w.largest(greatest.value, w.load(scores, w.add(line, at), f32))
            top = w.splat(w.top(greatest.value))
            total = w.variable(w.number(0.0))
            with w.loop(block.first, block.last, LANES) as at:
                power = w.exp(w.less(w.load(scores, w.add(line, at), f32), top))
                total.value = w.plus(total.value, power)
                w.store(power, scores, w.add(line, at), f32)
            share = w.over(w.number(1.0), w.splat(w.sum(total.value)))
            w.store(share, scores, w.add(line, seen.share), f32)
            for at in range(0, seen.dim, LANES):
                w.store(w.number(0.0), scores, w.add(line, seen.share, LANES + at), f32)


def _gather(w: Writer, seen: _Seen, block: _Block, values: Any) -> None:
    """Add the block's values, weighted by the scores, to the sums of each query head."""
    dim, dtype = seen.dim, seen.dtype
    first = w.times(block.head, seen.group)
    lines = [seen.line(w, block.token, first, one) for one in range(seen.group)]
    width = min(dim, max(1, _SUMS // seen.group) * LANES)
    for left in range(0, dim, width):
        places = range(left, min(dim, left + width), LANES)
        spots = [[w.add(line, seen.share, LANES + at) for at in places] for line in lines]
        sums = [[w.variable(w.load(seen.scores, spot, torch.float32)) for spot in own] for own in spots]
        with w.loop(block.begin, block.stop) as place:
            here = w.add(block.here, w.times(place, dim))
            known = [w.load(values, w.add(here, at), dtype) for at in places]
            w.prefetch(values, w.add(block.ahead, w.times(place, dim), left), len(places) * LANES, dtype)
            for line, totals in zip(lines, sums, strict=True):
                weight = w.splat_from(seen.scores, w.add(line, place))
                for total, part in zip(totals, known, strict=True):
                    total.value = w.fma(weight, part, total.value)
        for own, totals in zip(spots, sums, strict=True):
            for spot, total in zip(own, totals, strict=True):
                w.store(total.value, seen.scores, spot, torch.float32)


@cache
def export(dim: int, dtype: torch.dtype) -> Kernel:
    """(parts, blocks, count, sources, heads, tokens, row, start, held): copy keys and values out of a row in blocks.

    `sources` addresses in `parts`, of each layer's keys and values as `attend` has them; from the row's token `start`
    on. Each of the `count` addresses in `blocks` is of room for [sources, heads, tokens, dim], aligned to a line of the
    caches, which are left to what is read sooner.
    """
    w = Writer("export", [PTR, PTR] + [I64] * 7)
    parts, blocks, count, sources, heads, tokens, row, start, held = w.arguments
    chunk = chunk_tokens(dim, dtype)

    def copy(here: Any, there: Any, head: Any, position: Any, target: Any, count: Any) -> None:
        """`count` tokens of one chunk from `position` on, to token `target` of a block."""
        line = w.add(w.times(w.add(w.times(w.part(position, chunk), held), row), heads), head)
        place = w.times(w.add(w.times(line, chunk), w.rest(position, chunk)), dim)
        with w.loop(w.whole(0), w.times(count, dim), LANES) as at:
            w.copy(here, w.add(place, at), there, w.add(w.times(target, dim), at), dtype, past_caches=True)

    with w.loop(w.whole(0), sources) as source, w.loop(w.whole(0), heads) as head, w.loop(w.whole(0), count) as block:
        target = w.times(w.add(w.times(source, heads), head), tokens)
        here, there = w.pointer(w.load_int(parts, source)), w.pointer(w.load_int(blocks, block))
        begin = w.add(start, w.times(block, tokens))
        end = w.add(w.rest(begin, chunk), tokens)
        with w.where(end, "<=", w.whole(chunk)):  # all in one chunk: most blocks
            copy(here, there, head, begin, target, tokens)
        with w.where(end, ">", w.whole(chunk)), w.loop(w.whole(0), tokens) as token:
            copy(here, there, head, w.add(begin, token), w.add(target, token), w.whole(1))
    return w.compiled()
