"""Products by our own kernels, of which threads compute different columns (`team.py`)."""

from array import array
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from local_engine import kernels, team
from local_engine.simd import Kernel, Writer, address

_WORK_EACH: Final = 1 << 20
"""Multiplications that are worth a thread: one takes some 15 µs for them, as long as it takes to wake another."""
_TURNS: Final = 4
"""In how many a thread takes its stretch of a product's panels, so that others can take some of it."""


@dataclass(frozen=True, slots=True)
class Following:
    """The product whose weights are read next, whole numbers of LLVM's."""

    weights: Any
    inputs: Any
    outputs: Any


def multiply(
    w: Writer,
    sharing: team.Sharing,
    types: kernels.Types,
    ending: kernels.Ending,
    given: tuple[Any, ...],
    shape: tuple[Any, Any, Any],
    following: Following,
    beside: Any,
    room: Any,
) -> None:
    """A phase: `given` x, weights, other and out; `shape` rows, inputs and outputs; `room` this thread's own."""
    (_, weights, *_), (_, inputs, outputs) = given, shape
    kernel, threads = kernels.product(types, ending), sharing.threads
    panels = w.part(outputs, kernels.PANEL)
    each = w.greater(w.part(panels, w.times(threads, _TURNS)), w.whole(1))
    size = kernels.PANEL * types.weights.itemsize
    with sharing.phase(w, panels, each) as (begin, end, last):
        own = w.part(w.times(w.part(following.outputs, kernels.PANEL), sharing.index), threads)
        next_product = w.add(following.weights, w.times(w.times(own, following.inputs), size))
        goes_on = w.add(weights, w.times(w.times(end, inputs), size))
        columns = w.times(begin, kernels.PANEL), w.times(end, kernels.PANEL)
        w.call(kernel, *given, *shape, *columns, w.either(end, "<", last, goes_on, next_product), beside, room)


class _Word(IntEnum):
    """The words of a product that is computed by itself."""

    THREADS = 0
    CLAIMS = auto()
    X = auto()
    WEIGHTS = auto()
    OTHER = auto()
    OUT = auto()
    ROWS = auto()
    INPUTS = auto()
    OUTPUTS = auto()
    ROOM = auto()
    ROOM_BYTES = auto()
    """Of each thread."""


@cache
def _work(types: kernels.Types, ending: kernels.Ending) -> Kernel:
    """(words, index): what one of the threads does of it."""
    w = Writer("work", team.JOB_TYPES)
    words, index = w.arguments
    told = {word: w.load_int(words, w.whole(word)) for word in _Word}
    sharing = team.Sharing(index, told[_Word.THREADS], w.variable(told[_Word.CLAIMS]))
    given = told[_Word.X], told[_Word.WEIGHTS], told[_Word.OTHER], told[_Word.OUT]
    inputs, outputs = told[_Word.INPUTS], told[_Word.OUTPUTS]
    following = Following(told[_Word.WEIGHTS], inputs, outputs)
    room = w.add(told[_Word.ROOM], w.times(index, told[_Word.ROOM_BYTES]))
    multiply(w, sharing, types, ending, given, (told[_Word.ROWS], inputs, outputs), following, 0, room)
    return w.compiled()


class SharedProduct:
    """`kernels.product` over whole tensors, by as many threads as there are when it is made."""

    def __init__(self, types: kernels.Types, ending: kernels.Ending) -> None:
        self._run = kernels.product(types, ending)
        self._threads = kernels.threads()
        self._types, self._ending = types, ending

    def __call__(self, x: Tensor, packed: Tensor, other: Tensor | None, out: Tensor, outputs: int) -> None:
        """x [rows, inputs], contiguous, by packed weights of so many `outputs`."""
        rows, inputs = x.shape
        given = x.data_ptr(), packed.data_ptr(), 0 if other is None else other.data_ptr(), out.data_ptr()
        threads = max(1, min(self._threads, rows * inputs * outputs // _WORK_EACH))
        each = kernels.room_bytes(rows, inputs, self._types)
        room = torch.empty(threads * each, dtype=torch.uint8)
        if threads == 1:
            self._run(*given, rows, inputs, outputs, 0, outputs, packed.data_ptr(), 0, room.data_ptr())
            return
        claims = array("q", bytes(8 * team.claims_room(1, threads)))
        words = array("q", [threads, address(claims), *given, rows, inputs, outputs, room.data_ptr(), each])
        work = _work(self._types, self._ending)
        team.lead()(team.team(threads), work.address, address(words), threads)
