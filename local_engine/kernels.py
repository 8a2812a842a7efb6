"""Kernels of a decode step on a CPU, where torch's own are made for other sizes: few rows, short vectors.

Threads that share a step (`team.py`) run them over different columns, rows or heads.

Each row is computed by the same operations in the same order whatever the other rows are, so what a row gives does not
depend on its batch. Addresses are of contiguous rows of float32 or bfloat16; sums are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, auto
from functools import cache, partial
from typing import Any, Final, Literal

import torch

from local_engine import amx, team
from local_engine.pages import on_large_pages
from local_engine.simd import F32, HOST, I64, LANES, PTR, Kernel, Variable, Writer

Ending = Literal["plain", "bias", "sum", "gated"]
PANEL: Final = 2 * LANES
"""Columns of a product that are computed together."""
TILE_ROWS: Final = 8
"""Rows of a product that are computed together: 16 sums, which fit the registers of AVX-512."""
_FAR: Final = 32 << 10
_NEAR: Final = 4 << 10
"""Bytes of weights that are fetched before their turn, into the second cache and then into the first: the CPU's own
look-ahead ends with a page of memory, and the first cache can wait for few lines at a time. On an Intel Xeon whose
memory gives 15 GB/s all products of a 29M float32 model take 13.7 ms for eight rows if nothing is fetched, 9.7 if into
the first cache alone, 16 KiB ahead, and 8.7 so; 24 to 128 and 1 to 4 KiB do alike."""
LINE: Final = 64
"""Bytes of a line of the caches."""
_STEP_BYTES: Final = 2 * LINE
"""Weights of a panel that are used at once."""
_STEP_GIVES: Final = LINE
"""Bytes that memory gives, to be sure, while a step of a tile is computed: two nanoseconds."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What kinds of CPU were measured to differ in, where the tiles of a product share what is fetched."""

    turn: int
    """Steps of float32 in one turn of a tile's loop."""
    second: bool
    """The next panel's weights come to the second cache, not to the first."""
    beside: bool
    """What is read after a product of float32 is fetched beside its weights, at a pace told for turns of one step."""


ZEN: Final = Habits(turn=1, second=False, beside=True)
"""AMD's EPYC, whose last cache keeps what the second one drops."""
XEON: Final = Habits(turn=2, second=True, beside=False)
"""Intel's (Emerald Rapids): its last cache does not, and what counts and compares runs on the units for vectors. A step
of 32 rows of a 29M float32 model takes 23.2 ms by the EPYC's habits, 22.0 without `beside`, and 20.3 so."""
HABITS: Final = ZEN if HOST.startswith("znver") else XEON
"""This CPU's."""


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels are for this engine."""
    return device.type == "cpu" and made_for(dtype) and (threads() == 1 or team.supported())


def threads() -> int:
    """How many threads share a step of a model that is loaded now."""
    return min(torch.get_num_threads(), team.MOST)


def made_for(dtype: torch.dtype) -> bool:
    """Whether this CPU is one that they were measured on: AVX-512; for bfloat16, with its products."""
    if not torch.cpu._is_avx512_supported():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported())
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


@dataclass(frozen=True, slots=True)
class Types:
    """What the numbers of a product are."""

    states: torch.dtype
    """Those that go in and come out."""
    weights: torch.dtype
    """As they are held: as states, or in bfloat16 where states are float32 and the weights lose nothing by it."""

    @property
    def narrow(self) -> bool:
        return self.weights != self.states


def held_as(weights: Sequence[torch.Tensor]) -> torch.dtype:
    """How `product` is to hold weights of one type: float32 in bfloat16 where none loses anything by it, as most that
    are published. They are multiplied as the float32 that they are, but half as many bytes are read."""
    dtype = weights[0].dtype
    if dtype != torch.float32 or not usable(dtype, weights[0].device):
        return dtype
    return dtype if any(int(_low_halves(weight).count_nonzero()) for weight in weights) else torch.bfloat16


def _low_halves(weight: torch.Tensor) -> torch.Tensor:
    """What bfloat16 has no bits for."""
    return weight.contiguous().view(torch.int16).view(-1, 2)[:, 0]


def pack(weight: torch.Tensor, held: torch.dtype) -> torch.Tensor:
    """Weights [outputs, inputs] in the order in which `product` reads them; outputs are a multiple of PANEL.

    [panels, inputs, PANEL] in float32, [panels, inputs / 2, PANEL, 2] in bfloat16. Float32 ones `held` in bfloat16, by
    `held_as`: [panels, inputs, LANES, 2], of an input the columns i and LANES + i side by side.
    """
    outputs, inputs = weight.shape
    panels = outputs // PANEL
    if held == torch.float32:
        return on_large_pages(weight.view(panels, PANEL, inputs).transpose(1, 2))
    if weight.dtype == held:
        return on_large_pages(weight.view(panels, PANEL, inputs // 2, 2).transpose(1, 2))
    return on_large_pages(weight.to(held).view(panels, 2, LANES, inputs).permute(0, 3, 2, 1))


class Beside(IntEnum):
    """The words of what a product of several tiles fetches beside its weights, for whoever reads it afterwards.

    Memory is idle while such a product computes. It is read in runs, and every tile begins where the one before ends.
    """

    ADDRESS = 0
    RUN = auto()
    """Bytes."""
    STRIDE = auto()
    """Bytes from where one run begins to where the next one does."""
    END = auto()
    """Bytes after the address where nothing more is read."""
    PACE = auto()
    """Bytes per step of a tile, or 0: nothing is fetched."""


def _reads_beside(states: torch.dtype) -> bool:
    return HABITS.beside and states == torch.float32


def spare_bytes(rows: int, states: torch.dtype) -> int:
    """What memory can give per step of a tile besides a product's own weights, which all of its tiles share.

    With twice as much the product waits for memory itself: 160 µs instead of 135 for 1024 x 512 float32. Nothing in
    bfloat16, where a step of 32 rows took 2 % longer, and where it is not this CPU's habit.
    """
    tiles = rows // TILE_ROWS
    return max(0, _STEP_GIVES - _STEP_BYTES // tiles) if tiles and _reads_beside(states) else 0


def steps(rows: int, inputs: int, outputs: int, held: torch.dtype) -> int:
    """How many steps all whole tiles of a product take together."""
    return rows // TILE_ROWS * (outputs // PANEL) * inputs // _step(held)


def room_bytes(rows: int, inputs: int, types: Types) -> int:
    """What a thread's product needs for itself: for the sums of the CPU's own tiles, or for the weights of a panel as
    they are multiplied. Several tiles share these: the first widens them, which takes 12 % of its time."""
    if _by_amx(types):
        return amx.room_bytes()
    return inputs * PANEL * types.states.itemsize if types.narrow and rows >= 2 * TILE_ROWS else 0


def _by_amx(types: Types) -> bool:
    return types.states == torch.bfloat16 and amx.usable()


@cache
def product(types: Types, ending: Ending) -> Kernel:
    """(x, weights, other, out, rows, inputs, outputs, first, last, following, beside, room): x [rows, inputs] by packed
    weights, to columns first to last - 1 of out, multiples of PANEL.

    "plain": nothing more. "bias": plus other [outputs]. "sum": plus other [rows, outputs]. "gated": every panel has
    LANES columns of a gate, then LANES to be gated; out [rows, outputs / 2] gets silu(gate) * gated.

    `following` is the address of the weights that are read afterwards, whose first ones are fetched meanwhile;
    `beside` that of the words of `Beside`, or 0; where nothing is fetched beside (`spare_bytes`) it is not looked at.
    `room` is for `room_bytes`.
    """
    w = Writer("product", [PTR] * 4 + [I64] * 7 + [PTR])
    if _by_amx(types):
        left_over = w.rest(w.arguments[5], amx.INPUTS)
        with w.where(left_over, "==", w.whole(0)):
            _by_the_cpus_tiles(w, types, ending)
        with w.where(left_over, ">", w.whole(0)):
            _by_vectors(w, types, ending)
    else:
        _by_vectors(w, types, ending)
    return w.compiled()


def _by_the_cpus_tiles(w: Writer, types: Types, ending: Ending) -> None:
    x, weights, _, _, rows, inputs, _, first_column, last_column, _, _, room = w.arguments
    with w.loop(first_column, last_column, PANEL) as left:

        def end(row: Any, totals: Sequence[Any]) -> None:
            _end(w, row, left, totals, types.states, ending)

        own = w.place(weights, w.times(left, inputs), types.weights.itemsize)
        amx.panel(w, x, own, rows, inputs, room, end)
    w.release_tiles()


def _by_vectors(w: Writer, types: Types, ending: Ending) -> None:
    _, weights, _, _, rows, inputs, _, first_column, last_column, following, beside, room = w.arguments
    held = types.weights
    size = w.times(inputs, PANEL * held.itemsize)
    turn_bytes = _turn(held) * PANEL * held.itemsize
    tiles = w.part(rows, TILE_ROWS)
    told = {word: w.variable(w.whole(0)) for word in Beside} if _reads_beside(types.states) else {}
    with w.where(beside, "!=", w.whole(0)):
        for word, variable in told.items():
            variable.value = w.load_int(w.pointer(beside), w.whole(word))
    with w.loop(first_column, last_column, PANEL) as left:
        here = w.add(w.address(weights), w.times(w.times(left, inputs), held.itemsize))
        after = w.add(here, size)
        beyond = w.either(w.add(left, PANEL), "<", last_column, after, following)
        panel = _Panel(left, here, size, beyond)
        own = _Weights(weights, w.times(left, inputs), held)
        computed = w.variable(w.whole(0))
        with w.where(tiles, ">", w.whole(1)):
            pace = w.part(w.whole(turn_bytes), tiles)

            def one_of_several(tile: Any, source: _Weights) -> None:
                begin = w.add(beyond, w.times(w.times(tile, pace), w.part(size, turn_bytes)))
                share, row = _Share(begin, pace, second=HABITS.second), w.times(tile, TILE_ROWS)
                whole_tile = partial(_tile, w, TILE_ROWS, row, panel, source, types, ending)
                if told:
                    with w.where(told[Beside.PACE].value, "==", w.whole(0)):
                        whole_tile([share])
                    with w.where(told[Beside.PACE].value, ">", w.whole(0)):
                        done = w.add(w.times(w.part(left, PANEL), tiles), tile)
                        words = {word: variable.value for word, variable in told.items()}
                        whole_tile([share, _beside(w, words, w.times(done, w.part(inputs, _step(held))))])
                elif turn_bytes > 2 * LINE:  # few tiles have two lines a turn to fetch
                    with w.where(pace, "<=", w.whole(LINE)):
                        whole_tile([share])
                    with w.where(pace, ">", w.whole(LINE)):
                        whole_tile([share, _Share(w.add(begin, LINE), pace, second=HABITS.second)])
                else:
                    whole_tile([share])

            others, first_other = own, 0
            if types.narrow:
                one_of_several(w.whole(0), replace(own, widened=room))
                others, first_other = _Weights(room, w.whole(0), types.states), 1
            with w.loop(w.whole(first_other), tiles) as tile:
                one_of_several(tile, others)
            computed.value = w.times(tiles, TILE_ROWS)
        first = computed.value
        left_over = w.minus(rows, first)
        with w.where(left_over, ">=", w.whole(TILE_ROWS)):
            _tile(w, TILE_ROWS, first, panel, own, types, ending, [])
            computed.value = w.add(first, TILE_ROWS)
        first = computed.value
        left_over = w.minus(rows, first)
        for count in range(1, TILE_ROWS):
            with w.where(left_over, "==", w.whole(count)):
                _tile(w, count, first, panel, own, types, ending, [])


@dataclass(frozen=True, slots=True)
class _Panel:
    """PANEL columns of a product."""

    left: Any
    """The first of them."""
    here: Any
    """The address of its weights, a whole number; `size` is in bytes."""
    size: Any
    beyond: Any
    """The address of what is read after them."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where a tile reads those of its panel."""

    base: Any
    at: Any
    """The first of them, in elements."""
    held: torch.dtype
    widened: Any = None
    """Where they are left for the tiles that follow, as these multiply them."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What one of several tiles fetches of what is read later, so that memory is never idle."""

    begin: Any
    """An address."""
    pace: Any
    """Bytes per turn of the tile's loop, at most a line."""
    second: bool = False
    """To the second cache."""


def _turn(held: torch.dtype) -> int:
    """Inputs in one turn of the loop of a tile that shares; all inputs are a multiple of it."""
    return HABITS.turn if held == torch.float32 else _step(held)


def _step(held: torch.dtype) -> int:
    """Inputs whose weights are _STEP_BYTES."""
    return 1 if held == torch.float32 else 2


def _beside(w: Writer, told: dict[Beside, Any], steps: Any) -> _Share:
    """What a tile fetches after so many steps of the tiles before."""
    done = w.times(steps, told[Beside.PACE])
    run = w.part(done, told[Beside.RUN])
    offset = w.add(w.times(run, told[Beside.STRIDE]), w.minus(done, w.times(run, told[Beside.RUN])))
    return _Share(w.add(told[Beside.ADDRESS], w.lesser(offset, told[Beside.END])), told[Beside.PACE])


def _tile(
    w: Writer,
    count: int,
    row: Any,
    panel: _Panel,
    source: _Weights,
    types: Types,
    ending: Ending,
    shares: Sequence[_Share],
) -> None:
    """`count` rows from `row` on of a panel; without `shares` its own weights are fetched ahead."""
    _, _, _, out, _, inputs, outputs, *_ = w.arguments
    dtype, held = types.states, types.weights
    for at in range(count):
        # Before they are written, which takes until memory has given them: 50 of 630 µs of 4096 outputs of 32 rows.
        width = LANES if ending == "gated" else PANEL
        column = w.half(panel.left) if ending == "gated" else panel.left
        begin = w.add(w.times(w.add(row, at), w.half(outputs) if ending == "gated" else outputs), column)
        for line in range(0, width * dtype.itemsize, LINE):
            w.prefetch_from(w.add(w.address(w.place(out, begin, dtype.itemsize)), line), written=True)
    sums = [[w.variable(w.number(0.0)) for _ in range(2)] for _ in range(count)]
    lines = [w.times(w.add(row, at), inputs) for at in range(count)]
    turn = _turn(held) if shares else _step(held)
    together = 2 if dtype == torch.bfloat16 else 1
    with w.loop(w.whole(0), inputs, turn) as begin:
        for share in shares:
            place = w.add(share.begin, w.times(w.part(begin, turn), share.pace))
            w.prefetch_from(place, second=share.second)
        if not shares:
            _fetch(w, panel, w.times(begin, _STEP_BYTES // turn))
        for at in range(0, turn, together):
            _multiply(w, lines, w.add(begin, at), source, sums, dtype)
    for at, totals in enumerate(sums):
        _end(w, w.add(row, at), panel.left, [total.value for total in totals], dtype, ending)


def _multiply(
    w: Writer, lines: Sequence[Any], at: Any, source: _Weights, sums: Sequence[Sequence[Variable]], dtype: torch.dtype
) -> None:
    """The input `at` of some rows, which begin at `lines`, by its weights; of bfloat16 rows that and the next one."""
    x, place = w.arguments[0], w.add(source.at, w.times(at, PANEL))
    pairs = dtype == torch.bfloat16
    if pairs:
        halves = [w.load_pairs(source.base, w.add(place, half * 2 * LANES)) for half in range(2)]
    elif source.held == torch.bfloat16:
        halves = w.load_both(source.base, place)
    else:
        halves = [w.load(source.base, w.add(place, half * LANES), torch.float32) for half in range(2)]
    if source.widened is not None:
        for half, weights in enumerate(halves):
            w.store(weights, source.widened, w.add(w.times(at, PANEL), half * LANES), torch.float32)
    fma = w.fma_pairs if pairs else w.fma
    for line, totals in zip(lines, sums, strict=True):
        spot = w.add(line, at)
        factor = w.splat_pair_from(x, spot) if pairs else w.splat_from(x, spot)
        for half, total in zip(halves, totals, strict=True):
            total.value = fma(factor, half, total.value)


def _fetch(w: Writer, panel: _Panel, done: Any) -> None:
    """Have fetched what is needed soon, where `done` bytes of a panel were used."""
    ahead = w.add(done, _FAR)
    begin = w.either(ahead, "<", panel.size, panel.here, w.minus(panel.beyond, panel.size))
    for line in range(0, _STEP_BYTES, LINE):
        w.prefetch_from(w.add(begin, ahead, line), second=True)
        w.prefetch_from(w.add(panel.here, done, _NEAR + line))


def _end(w: Writer, row: Any, left: Any, totals: Sequence[Any], dtype: torch.dtype, ending: Ending) -> None:
    _, _, other, out, _, _, outputs, *_ = w.arguments
    if ending == "gated":
        gate, gated = totals
        opened = w.over(gate, w.plus(w.number(1.0), w.exp(w.less(w.number(0.0), gate))))
        w.store(w.by(opened, gated), out, w.half(w.add(w.times(row, outputs), left)), dtype)
        return
    for half, value in enumerate(totals):
        column = w.add(left, half * LANES)
        place = w.add(w.times(row, outputs), column)
        if ending == "bias":
            value = w.plus(value, w.load(other, column, dtype))
        elif ending == "sum":
            value = w.plus(value, w.load(other, place, dtype))
        w.store(value, out, place, dtype)
