"""Products of bfloat16 by a CPU's own matrix tiles (Intel's AMX): 16 rows by 16 columns by 32 inputs at once.

A row's sums are computed alike however many rows are beside it. So a single row goes this way, too: its weights, which
it waits for, take longer to come than to be multiplied. What a tile holds of them, 16 pairs of inputs by 16 columns, is
as `kernels.pack` lays them out. Intel's Software Developer's Manual has the instructions (TDPBF16PS and its like).
"""

from array import array
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch

from local_engine.simd import LANES, Writer, address

INPUTS: Final = 32
"""Of a tile; a product whose inputs are no multiple is not computed by tiles."""
_PANEL: Final = 2 * LANES
_ROWS: Final = 32
"""Two tiles of rows by two of columns are summed up at once: with the four that are multiplied these are all."""
_TILE_ROWS: Final = 16
_STATES: Final = (4, 5)
_WEIGHTS: Final = (6, 7)
"""The tiles that are multiplied; those of sums come first."""
_LINE: Final = 64
"""Bytes of a tile's row, and of a line of the caches."""
_NEAR: Final = 4 << 10
"""Bytes of weights that are fetched before their turn. Nothing is gained by fetching 32 KiB ahead, too, as `kernels`
does: of a 29M model 1 and 32 rows take 2.57 and 5.21 ms so, and 2.66 and 5.24 with both (an Intel Xeon)."""


@cache
def usable() -> bool:
    """Whether this CPU has them, and the system lets this process use them."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


@cache
def _configs() -> "array[int]":
    """What the CPU is told of its tiles for 1, 2, ... _ROWS rows: palette 1, then bytes per row, and rows, of each."""
    found = array("B")
    for count in range(1, _ROWS + 1):
        first, second = min(count, _TILE_ROWS), max(0, count - _TILE_ROWS)
        rows = [first, first, second, second, first, second, _TILE_ROWS, _TILE_ROWS]
        widths = array("H", [_LINE if of else 0 for of in rows] + [0] * 8)
        found.extend([1, *[0] * 15, *widths.tobytes(), *rows, *[0] * 8])
    return found


def room_bytes() -> int:
    """What a thread needs for itself: the sums of its rows, before they go on."""
    return _ROWS * _PANEL * torch.float32.itemsize


def panel(
    w: Writer, x: Any, weights: Any, rows: Any, inputs: Any, room: Any, end: Callable[[Any, list[Any]], None]
) -> None:
    """x [rows, inputs] by the `weights` of one panel of columns; `end` is given each row and its two vectors of sums.

    The tiles are to be released afterwards.
    """
    config = address(_configs())
    with w.loop(w.whole(0), rows, _ROWS) as first:
        count = w.lesser(w.minus(rows, first), w.whole(_ROWS))
        w.set_tiles(w.pointer(w.add(w.times(w.minus(count, w.whole(1)), _LINE), config)))
        for relation, tiles in (("<=", 1), (">", 2)):
            with w.where(count, relation, w.whole(_TILE_ROWS)):
                with w.where(first, "==", w.whole(0)):
                    _sums(w, x, weights, first, tiles, inputs, room, fetches=True)
                with w.where(first, ">", w.whole(0)):
                    _sums(w, x, weights, first, tiles, inputs, room, fetches=False)
        with w.loop(w.whole(0), count) as row:
            at = w.times(row, _PANEL)
            end(w.add(first, row), [w.load(room, w.add(at, half * LANES), torch.float32) for half in range(2)])


def _sums(w: Writer, x: Any, weights: Any, first: Any, tiles: int, inputs: Any, room: Any, *, fetches: bool) -> None:
    """Those of one or two tiles of rows, from `first` on, to `room` [rows, _PANEL]."""
    size, pairs = torch.bfloat16.itemsize, 2 * _LINE  # of both halves of a panel
    numbers = {(tile, half): 2 * tile + half for tile in range(tiles) for half in range(2)}
    for number in numbers.values():
        w.clear_tile(number)
    with w.loop(w.whole(0), inputs, INPUTS) as at:
        here = w.times(at, _PANEL * size)
        if fetches:
            for line in range(0, INPUTS * _PANEL * size, _LINE):
                w.prefetch_from(w.add(w.address(weights), here, _NEAR + line))
        for half, number in enumerate(_WEIGHTS):
            w.load_tile(number, w.place(weights, w.add(here, half * _LINE), 1), w.whole(pairs))
        for tile in range(tiles):
            begin = w.add(w.times(w.add(first, tile * _TILE_ROWS), inputs), at)
            w.load_tile(_STATES[tile], w.place(x, begin, size), w.times(inputs, size))
        for (tile, half), number in numbers.items():
            w.multiply_tiles(number, _STATES[tile], _WEIGHTS[half])
    for (tile, half), number in numbers.items():
        place = w.place(room, w.whole(tile * _TILE_ROWS * _PANEL + half * LANES), 4)
        w.store_tile(number, place, w.whole(_PANEL * 4))
