"""Kernels of a decode step on one CPU thread, where torch's own are made for other sizes: few rows, short vectors.

Each row is computed by the same operations in the same order whatever the other rows are, so what a row gives does not
depend on its batch. Addresses are of contiguous rows of float32 or bfloat16; sums are float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch

from local_engine.pages import on_large_pages
from local_engine.simd import F32, I64, LANES, PTR, Kernel, Sums, Variable, Writer

Ending = Literal["plain", "bias", "sum", "gated"]
PANEL: Final = 2 * LANES
"""Columns of a product that are computed together."""
TILE_ROWS: Final = 8
"""Rows of a product that are computed together: 16 sums, which fit the registers of AVX-512."""
_AHEAD: Final = 16 << 10
"""Bytes of weights that are fetched before their turn: the CPU's own look-ahead ends with a page of memory. Of 1 to 64
KiB the best; without, eight rows of a float32 step took 7.3 ms instead of 4.5, in bfloat16 4.3 instead of 2.3."""
LINE: Final = 64
"""Bytes of a line of the caches."""
_STEP_BYTES: Final = 2 * LINE
"""Weights of a panel that are used at once."""
_SUMS: Final = 16
"""Vectors that attention sums up at once."""
_CHUNK_BYTES: Final = 8 << 10
"""Of one head's keys: while they are read, the next ones come to the first cache, which holds several times as many."""


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels are for this engine: with more than one thread torch's own are faster, which share work."""
    return device.type == "cpu" and torch.get_num_threads() == 1 and made_for(dtype)


def made_for(dtype: torch.dtype) -> bool:
    """Whether this CPU is one that they were measured on: AVX-512; for bfloat16, with its products but no AMX tiles."""
    if not torch.cpu._is_avx512_supported():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())
    return dtype == torch.float32


@cache
def take(width: int, dtype: torch.dtype) -> Kernel:
    """(source, indexes, out, rows): rows of `width` elements, each the one of `source` that its index (int64) names."""
    w = Writer("take", [PTR, PTR, PTR, I64])
    source, indexes, out, rows = w.arguments
    with w.loop(w.whole(0), rows) as row:
        begin = w.times(w.load_int(indexes, row), width)
        with w.loop(w.whole(0), w.whole(width), LANES) as at:
            w.copy(source, w.add(begin, at), out, w.add(w.times(row, width), at), dtype)
    return w.compiled()


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
    with w.loop(w.whole(0), sources) as source, w.loop(w.whole(0), heads) as head, w.loop(w.whole(0), count) as block:
        target = w.times(w.add(w.times(source, heads), head), tokens)
        here, there = w.pointer(w.load_int(parts, source)), w.pointer(w.load_int(blocks, block))
        with w.loop(w.whole(0), tokens) as token:
            position = w.add(start, w.times(block, tokens), token)
            line = w.add(w.times(w.add(w.times(w.part(position, chunk), held), row), heads), head)
            place = w.times(w.add(w.times(line, chunk), w.rest(position, chunk)), dim)
            for at in range(0, dim, LANES):
                to = w.add(w.times(w.add(target, token), dim), at)
                w.copy(here, w.add(place, at), there, to, dtype, past_caches=True)
    return w.compiled()


@cache
def rms_norm(width: int, dtype: torch.dtype) -> Kernel:
    """(x, weight, out, rows, epsilon): rows of `width` elements."""
    w = Writer("rms_norm", [PTR, PTR, PTR, I64, F32])
    x, weight, out, rows, epsilon = w.arguments
    with w.loop(w.whole(0), rows) as row:
        base = w.times(row, width)
        squares = w.variable(w.number(0.0))
        with w.loop(w.whole(0), w.whole(width), LANES) as at:
            value = w.load(x, w.add(base, at), dtype)
            squares.value = w.fma(value, value, squares.value)
        scale = _scale(w, squares.value, width, epsilon)
        with w.loop(w.whole(0), w.whole(width), LANES) as at:
            value = w.by(w.load(x, w.add(base, at), dtype), scale)
            w.store(w.by(value, w.load(weight, at, dtype)), out, w.add(base, at), dtype)
    return w.compiled()


@cache
def rotate(dim: int, dtype: torch.dtype, *, normed: bool) -> Kernel:
    """(heads, weights, cos, sin, tokens, rotated, stride, epsilon): the first `rotated` heads of each token, in place.

    heads has `stride` elements per token; weights [rotated, dim] are of the heads' RMS norm, used where `normed`;
    cos and sin [tokens, dim], the first half of the sine negative.
    """
    w = Writer("rotate", [PTR, PTR, PTR, PTR, I64, I64, I64, F32])
    heads, weights, cos, sin, tokens, rotated, stride, epsilon = w.arguments
    places = range(0, dim, LANES)
    with w.loop(w.whole(0), tokens) as token, w.loop(w.whole(0), rotated) as head:
        base = w.add(w.times(token, stride), w.times(head, dim))
        values = [w.load(heads, w.add(base, at), dtype) for at in places]
        if normed:
            squares = w.by(values[0], values[0])
            for value in values[1:]:
                squares = w.fma(value, value, squares)
            scale = _scale(w, squares, dim, epsilon)
            own = [w.load(weights, w.add(w.times(head, dim), at), dtype) for at in places]
            values = [w.by(w.by(value, scale), weight) for value, weight in zip(values, own, strict=True)]
        turned = values[len(values) // 2 :] + values[: len(values) // 2]
        for at, value, other in zip(places, values, turned, strict=True):
            angle = w.add(w.times(token, dim), at)
            result = w.fma(value, w.load(cos, angle, dtype), w.by(other, w.load(sin, angle, dtype)))
            w.store(result, heads, w.add(base, at), dtype)
    return w.compiled()


def _scale(w: Writer, squares: Any, count: int, epsilon: Any) -> Any:
    """1 / sqrt(mean of squares + epsilon), in every lane."""
    mean = w.over(w.splat(w.sum(squares)), w.number(float(count)))
    return w.over(w.number(1.0), w.sqrt(w.plus(mean, w.splat(epsilon))))


def chunk_tokens(dim: int, dtype: torch.dtype) -> int:
    """How many tokens of one row and head `attend` wants side by side: a power of two."""
    fitting = _CHUNK_BYTES // (dim * dtype.itemsize)
    return max(LANES, 1 << fitting.bit_length() - 1)


@cache
def attend(dim: int, group: int, dtype: torch.dtype) -> Kernel:
    """(query, key, value, keys, values, out, rows, positions, scores, tokens, heads, held, query_stride, key_stride,
    value_stride, scale, window): all tokens store their keys and values, and attend.

    keys, values [chunks, held rows, heads, `chunk_tokens`, dim]; `rows` and `positions` (int64) say where each token
    goes; it sees the `window` tokens up to itself. query has heads * group heads per token; out [tokens, heads * group,
    dim]; strides are elements per token; scores has room for `scores_room` float32.

    All rows' first chunks are read, then all their second ones: first the keys, then the values. So memory is read
    from end to end but for the rows' last chunks; rows one behind the other, each of which fills half of its place, are
    read 1.3 to 1.5 times slower.
    """
    w = Writer("attend", [PTR] * 9 + [I64] * 6 + [F32, I64])
    query, key, value, keys, values, out, rows, positions, scores = w.arguments[:9]
    tokens, heads, held, query_stride, key_stride, value_stride, scale, window = w.arguments[9:]
    chunk = chunk_tokens(dim, dtype)
    longest = w.variable(w.whole(0))
    with w.loop(w.whole(0), tokens) as token:
        longest.value = w.greater(longest.value, w.add(w.load_int(positions, token), 1))
    most = w.times(w.add(w.part(longest.value, LANES), 2), LANES)
    seen = _Seen(rows, positions, tokens, heads, held, window, longest.value, scores, most, chunk, dim, group, dtype)
    with _chunks(w, seen) as block:
        _keep(w, seen, block, key, key_stride, keys)
        asked = w.add(w.times(block.token, query_stride), w.times(block.head, group * dim))
        _score(w, seen, block, keys, query, asked, scale)
    with _chunks(w, seen) as block:
        _keep(w, seen, block, value, value_stride, values)
        _soften(w, seen, block)
        _gather(w, seen, block, values)
    with w.loop(w.whole(0), tokens) as token, w.loop(w.whole(0), w.times(heads, group)) as head:
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
    held: Any
    window: Any
    longest: Any
    scores: Any
    """[tokens, heads * group]: a score per key, from `share` on what they are to be multiplied by (LANES times), then the
    sum of values so far."""
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
            beyond = w.minus(seen.place(w, following, w.add(index, more)), past)
            with w.loop(w.whole(0), seen.heads) as head:
                here = w.add(base, w.times(head, size))
                ahead = w.either(w.add(head, 1), "<", seen.heads, w.add(here, size), beyond)
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


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Weights [outputs, inputs] in the order in which `product` reads them; outputs are a multiple of PANEL.

    [panels, inputs, PANEL] in float32, [panels, inputs / 2, PANEL, 2] in bfloat16.
    """
    outputs, inputs = weight.shape
    if weight.dtype == torch.float32:
        return on_large_pages(weight.view(outputs // PANEL, PANEL, inputs).transpose(1, 2))
    return on_large_pages(weight.view(outputs // PANEL, PANEL, inputs // 2, 2).transpose(1, 2))


@cache
def product(dtype: torch.dtype, ending: Ending) -> Kernel:
    """(x, weights, other, out, rows, inputs, outputs, following): x [rows, inputs] times packed weights, to out.

    "plain": nothing more. "bias": plus other [outputs]. "sum": plus other [rows, outputs]. "gated": every panel has
    LANES columns of a gate, then LANES to be gated; out [rows, outputs / 2] gets silu(gate) * gated.

    `following` is the address of the weights that are read afterwards, whose first ones are fetched meanwhile.
    """
    w = Writer("product", [PTR, PTR, PTR, PTR, I64, I64, I64, I64])
    _, weights, _, _, rows, inputs, outputs, following = w.arguments
    size = w.times(inputs, PANEL * dtype.itemsize)
    tiles = w.part(rows, TILE_ROWS)
    with w.loop(w.whole(0), outputs, PANEL) as left:
        here = w.add(w.address(weights), w.times(w.times(left, inputs), dtype.itemsize))
        after = w.add(here, size)
        beyond = w.either(w.add(left, PANEL), "<", outputs, after, following)
        panel = _Panel(left, w.times(left, inputs), here, size, beyond)
        done = w.variable(w.whole(0))
        with w.where(tiles, ">", w.whole(1)):
            pace = w.part(w.whole(_STEP_BYTES), tiles)
            with w.loop(w.whole(0), tiles) as tile:
                begin = w.add(beyond, w.times(w.times(tile, pace), w.part(size, _STEP_BYTES)))
                _tile(w, TILE_ROWS, w.times(tile, TILE_ROWS), panel, dtype, ending, _Share(begin, pace))
            done.value = w.times(tiles, TILE_ROWS)
        first = done.value
        left_over = w.minus(rows, first)
        with w.where(left_over, ">=", w.whole(TILE_ROWS)):
            _tile(w, TILE_ROWS, first, panel, dtype, ending, None)
            done.value = w.add(first, TILE_ROWS)
        first = done.value
        left_over = w.minus(rows, first)
        for count in range(1, TILE_ROWS):
            with w.where(left_over, "==", w.whole(count)):
                _tile(w, count, first, panel, dtype, ending, None)
    return w.compiled()


@dataclass(frozen=True, slots=True)
class _Panel:
    """PANEL columns of a product."""

    left: Any
    """The first of them."""
    at: Any
    """Where its weights begin, in elements."""
    here: Any
    """The address of its weights, a whole number; `size` is in bytes."""
    size: Any
    beyond: Any
    """The address of what is read after them."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What one of several tiles fetches of the panel that comes next, so that memory is never idle."""

    begin: Any
    """An address."""
    pace: Any
    """Bytes per step."""


def _tile(
    w: Writer, count: int, row: Any, panel: _Panel, dtype: torch.dtype, ending: Ending, share: _Share | None
) -> None:
    """`count` rows from `row` on of a panel."""
    x, weights, _, out, _, inputs, outputs, _ = w.arguments
    for at in range(count):
        width = LANES if ending == "gated" else PANEL
        column = w.half(panel.left) if ending == "gated" else panel.left
        begin = w.add(w.times(w.add(row, at), w.half(outputs) if ending == "gated" else outputs), column)
        for line in range(0, width * dtype.itemsize, LINE):
            w.prefetch_from(w.add(w.address(w.place(out, begin, dtype.itemsize)), line), written=True)
    sums = [[w.variable(w.number(0.0)) for _ in range(2)] for _ in range(count)]
    lines = [w.times(w.add(row, at), inputs) for at in range(count)]
    step = 1 if dtype == torch.float32 else 2
    with w.loop(w.whole(0), inputs, step) as at:
        place = w.add(panel.at, w.times(at, PANEL))
        if dtype == torch.float32:
            halves = [w.load(weights, w.add(place, half * LANES), dtype) for half in range(2)]
        else:
            halves = [w.load_pairs(weights, w.add(place, half * 2 * LANES)) for half in range(2)]
        _fetch(w, panel, w.times(at, _STEP_BYTES // step), share)
        for line, totals in zip(lines, sums, strict=True):
            spot = w.add(line, at)
            factor = w.splat_from(x, spot) if dtype == torch.float32 else w.splat_pair_from(x, spot)
            for half, total in zip(halves, totals, strict=True):
                fma = w.fma if dtype == torch.float32 else w.fma_pairs
                total.value = fma(factor, half, total.value)
    for at, totals in enumerate(sums):
        _end(w, w.add(row, at), panel.left, totals, dtype, ending)


def _fetch(w: Writer, panel: _Panel, done: Any, share: _Share | None) -> None:
    """Have fetched what is needed soon, where `done` bytes of a panel were used."""
    if share is None:
        ahead = w.add(done, _AHEAD)
        begin = w.either(ahead, "<", panel.size, panel.here, w.minus(panel.beyond, panel.size))
        for line in range(0, _STEP_BYTES, LINE):
            w.prefetch_from(w.add(begin, ahead, line))
        return
    w.prefetch_from(w.add(share.begin, w.times(w.part(done, _STEP_BYTES), share.pace)))


def _end(w: Writer, row: Any, left: Any, totals: list[Variable], dtype: torch.dtype, ending: Ending) -> None:
    _, _, other, out, _, _, outputs, _ = w.arguments
    if ending == "gated":
        gate, gated = (total.value for total in totals)
        opened = w.over(gate, w.plus(w.number(1.0), w.exp(w.less(w.number(0.0), gate))))
        w.store(w.by(opened, gated), out, w.half(w.add(w.times(row, outputs), left)), dtype)
        return
    for half, total in enumerate(totals):
        column = w.add(left, half * LANES)
        place = w.add(w.times(row, outputs), column)
        value = total.value
        if ending == "bias":
            value = w.plus(value, w.load(other, column, dtype))
        elif ending == "sum":
            value = w.plus(value, w.load(other, place, dtype))
        w.store(value, out, place, dtype)
