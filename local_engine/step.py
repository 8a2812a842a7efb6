"""A step in one native call: from tokens to logits, by our own kernels one after the other, over buffers that stay.

Its phases are shared by threads (`team.py`). Each product is told whose weights come next, so that memory does not wait
for norms and attention.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any, Final

import torch

from local_engine import chunks, kernels, team
from local_engine.rows_plan import GROUP_WORDS, GroupWord
from local_engine.shared_product import Following, multiply
from local_engine.simd import PTR, Kernel, Writer


class StepWord(IntEnum):
    """The words of what a step is told: addresses and counts."""

    ROWS = 0
    HIDDEN = auto()
    NORMED = auto()
    HEADS = auto()
    SEEN = auto()
    GATED = auto()
    SCORES = auto()
    COS = auto()
    SIN = auto()
    PLACES = auto()
    POSITIONS = auto()
    GROUPS = auto()
    TAPS = auto()
    TAP_ROWS = auto()
    TAP_COUNT = auto()
    FETCH = auto()
    EMBEDDING = auto()
    """0: the hidden states are there already."""
    TOKENS = auto()
    COS_TABLE = auto()
    SIN_TABLE = auto()
    LOGIT_ROWS = auto()
    LOGIT_COUNT = auto()
    LOGITS = auto()
    LAYERS = auto()
    FIRST = auto()
    LAST = auto()
    NORM = auto()
    HEAD = auto()
    PARTS = auto()
    """Where each part of the groups begins, and the last one ends: threads attend to different ones."""
    PART_COUNT = auto()
    SCORES_BYTES = auto()
    """Of each thread."""
    ROOM = auto()
    """`Sizes.room_bytes` of each thread."""
    TEAM = auto()
    THREADS = auto()
    CLAIMS = auto()
    CLAIMS_WORDS = auto()


class Stream(IntEnum):
    """What products fetch beside their weights of the keys and values that are attended to next."""

    QKV = 0
    """The first keys of its own layer: the last that are fetched, and the first that are read."""
    GATED = auto()
    """The other keys of the next layer."""
    DOWN = auto()
    """The values of the next layer."""


OFFSET: Final = len(kernels.Beside)
"""The word of a stream, after those of `Beside`, that says where in a layer's keys or values it begins: in bytes."""
STREAM_WORDS: Final = OFFSET + 1
PHASES_AROUND: Final = 3
PHASES: Final = 7
"""Of each layer; and those before and after all layers."""
ADDRESSES: Final = len(Stream) * STREAM_WORDS
"""The word, after all streams, that says where the addresses of all layers' keys and values are."""


class Layer(IntEnum):
    """The words of what a layer is."""

    INPUT_NORM = 0
    QKV = auto()
    QKV_BIAS = auto()
    HEAD_NORMS = auto()
    OUTPUT = auto()
    MLP_NORM = auto()
    GATED = auto()
    DOWN = auto()
    WINDOW = auto()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all layers of a model have in common."""

    width: int
    inner: int
    query_heads: int
    kv_heads: int
    head_dim: int
    types: kernels.Types
    scale: float
    epsilon: float
    head_epsilon: float
    normed: bool
    biased: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.types.states

    @property
    def room_bytes(self) -> int:
        """What products of any number of rows need for themselves, of each thread."""
        most = max(self.width, self.inner, self.seen_width)
        return kernels.room_bytes(2 * kernels.TILE_ROWS, most, self.types)

    @property
    def heads_width(self) -> int:
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def seen_width(self) -> int:
        return self.query_heads * self.head_dim


class _Step:
    """A step under construction, as each of the threads that share it runs it."""

    def __init__(self, sizes: Sizes, *, shared: bool) -> None:
        self.sizes = sizes
        self.w = w = Writer("work", team.JOB_TYPES)
        step, self.index = w.arguments
        self.told = {word: w.load_int(step, w.whole(word)) for word in StepWord}
        self.rows = self.told[StepWord.ROWS]
        self.threads = self.told[StepWord.THREADS] if shared else w.whole(1)
        self._sharing = team.Sharing(
            self.index, self.threads, w.variable(self.told[StepWord.CLAIMS]) if shared else None
        )

    def shared(self, units: Any, each: Any) -> AbstractContextManager[tuple[Any, Any, Any]]:
        return self._sharing.phase(self.w, units, each)

    def shared_rows(self, rows: Any, more: int = 0) -> AbstractContextManager[tuple[Any, Any, Any]]:
        """As many rows at a time as make one part for each thread; `more` units follow them."""
        w = self.w
        return self.shared(w.add(rows, more), w.part(w.add(rows, more, self.threads, -1), self.threads))

    def at(self, base: Any, row: Any, width: int, size: int | None = None) -> Any:
        """The address of a row, of elements of the model's type, or of `size` bytes each."""
        return self.w.add(base, self.w.times(row, width * (size or self.sizes.dtype.itemsize)))

    def multiply(
        self,
        ending: kernels.Ending,
        given: tuple[Any, ...],
        shape: tuple[Any, int, int],
        following: tuple[Any, int, int],
        beside: Any = 0,
    ) -> None:
        """A product: `given` x, weights, other and out; `shape` rows, inputs and outputs; `following` the weights,
        inputs and outputs of the next one."""
        w = self.w
        rows, inputs, outputs = shape
        weights, *sides = following
        then = Following(weights, *map(w.whole, sides))
        sized = rows, w.whole(inputs), w.whole(outputs)
        room = w.add(self.told[StepWord.ROOM], w.times(self.index, self.sizes.room_bytes))
        multiply(w, self._sharing, self.sizes.types, ending, given, sized, then, beside, room)


@cache
def _work(sizes: Sizes, epsilon: float, vocabulary: int | None, *, shared: bool) -> Kernel:
    """(step, index): what one of a step's threads does of it, from tokens to LOGITS of LOGIT_ROWS.

    Without a `vocabulary` the head is no product of ours, and what it is to be given is left in NORMED.
    """
    dtype, width = sizes.dtype, sizes.width
    step = _Step(sizes, shared=shared)
    w, told = step.w, step.told
    take, norm = kernels.take(width, dtype), kernels.rms_norm(width, dtype)
    angles = kernels.take(sizes.head_dim, dtype)
    hidden, normed, count, last = (
        told[word] for word in (StepWord.HIDDEN, StepWord.NORMED, StepWord.LOGIT_COUNT, StepWord.LAST)
    )

    def tapped(layer: Any) -> None:
        target = w.load_int(w.pointer(told[StepWord.TAPS]), layer)
        with w.where(target, "!=", w.whole(0)):
            w.call(take, hidden, told[StepWord.TAP_ROWS], target, told[StepWord.TAP_COUNT])

    with step.shared_rows(step.rows) as (begin, end, _):
        some = w.minus(end, begin)
        with w.where(told[StepWord.EMBEDDING], "!=", w.whole(0)):
            tokens = step.at(told[StepWord.TOKENS], begin, 1, 8)
            w.call(take, told[StepWord.EMBEDDING], tokens, step.at(hidden, begin, width), some)
        places = step.at(told[StepWord.POSITIONS], begin, 1, 8)
        for table, target in ((StepWord.COS_TABLE, StepWord.COS), (StepWord.SIN_TABLE, StepWord.SIN)):
            w.call(angles, told[table], places, step.at(told[target], begin, sizes.head_dim), some)
    with w.loop(told[StepWord.FIRST], last) as layer:
        _layer(step, layer, norm, tapped)
    with step.shared_rows(count, 1) as (begin, end, _):
        with w.where(end, ">", count):
            tapped(last)
        some, mine = w.minus(w.lesser(end, count), begin), step.at(normed, begin, width)
        with w.where(some, ">", w.whole(0)):
            w.call(take, hidden, step.at(told[StepWord.LOGIT_ROWS], begin, 1, 8), mine, some)
            w.call(norm, mine, told[StepWord.NORM], mine, some, epsilon)
    if vocabulary is not None:
        with w.where(count, ">", w.whole(0)):
            head = told[StepWord.HEAD]
            given = normed, head, 0, told[StepWord.LOGITS]
            step.multiply("plain", given, (count, width, vocabulary), (head, width, vocabulary))
    return w.compiled()


def _layer(step: _Step, layer: Any, norm: Kernel, tapped: Callable[[Any], None]) -> None:
    """One layer over the hidden states, in place."""
    w, told, sizes, rows = step.w, step.told, step.sizes, step.rows
    width = sizes.width
    hidden, normed, heads, seen, gated = (
        told[word] for word in (StepWord.HIDDEN, StepWord.NORMED, StepWord.HEADS, StepWord.SEEN, StepWord.GATED)
    )
    layers = w.pointer(told[StepWord.LAYERS])
    base = w.times(layer, len(Layer))
    own = {word: w.load_int(layers, w.add(base, word)) for word in Layer}
    next_qkv = w.load_int(layers, w.add(base, len(Layer) + Layer.QKV))

    def beside(stream: Stream, layer: Any, which: int) -> Any:
        """The address of a stream's words, made to be of the keys (0) or values (1) of a layer; 0 if there are none."""
        words = w.variable(w.whole(0))
        with w.where(told[StepWord.FETCH], "!=", w.whole(0)), w.where(layer, "<", told[StepWord.LAST]):
            fetch, at = w.pointer(told[StepWord.FETCH]), stream * STREAM_WORDS
            held = w.load_int(w.pointer(w.load_int(fetch, w.whole(ADDRESSES))), w.add(w.times(layer, 2), which))
            w.store_int(
                w.add(held, w.load_int(fetch, w.whole(at + OFFSET))), fetch, w.whole(at + kernels.Beside.ADDRESS)
            )
            words.value = w.add(told[StepWord.FETCH], at * 8)
        return words.value

    def normed_by(weight: Any, begin: Any, end: Any) -> None:
        with w.where(end, ">", begin):
            places = step.at(hidden, begin, width), weight, step.at(normed, begin, width)
            w.call(norm, *places, w.minus(end, begin), sizes.epsilon)

    with step.shared_rows(rows, 1) as (begin, end, _):
        with w.where(end, ">", rows):
            tapped(layer)
        normed_by(own[Layer.INPUT_NORM], begin, w.lesser(end, rows))
    output, gate = (own[Layer.OUTPUT], sizes.seen_width, width), (own[Layer.GATED], width, 2 * sizes.inner)
    down, next_layer = (own[Layer.DOWN], sizes.inner, width), (next_qkv, width, sizes.heads_width)
    given = normed, own[Layer.QKV], own[Layer.QKV_BIAS], heads
    ending: kernels.Ending = "bias" if sizes.biased else "plain"
    step.multiply(ending, given, (rows, *next_layer[1:]), output, beside(Stream.QKV, layer, 0))
    _attend(step, layer, own)
    step.multiply("sum", (seen, output[0], hidden, hidden), (rows, *output[1:]), gate)
    with step.shared_rows(rows) as (begin, end, _):
        normed_by(own[Layer.MLP_NORM], begin, end)
    after = w.add(layer, 1)
    keys, values = beside(Stream.GATED, after, 0), beside(Stream.DOWN, after, 1)
    step.multiply("gated", (normed, gate[0], 0, gated), (rows, *gate[1:]), down, keys)
    step.multiply("sum", (gated, down[0], hidden, hidden), (rows, *down[1:]), next_layer, values)


def _attend(step: _Step, layer: Any, own: dict[Layer, Any]) -> None:
    """Turn queries and keys, store keys and values, and attend: units are the key heads of each part."""
    w, told, sizes, threads = step.w, step.told, step.sizes, step.threads
    dim, stride, kv_heads = sizes.head_dim, sizes.heads_width, sizes.kv_heads
    queries_each = sizes.query_heads // kv_heads
    turn = kernels.rotate(dim, sizes.dtype, normed=sizes.normed)
    attend = chunks.attend(dim, queries_each, sizes.dtype)
    groups, parts, count = (told[word] for word in (StepWord.GROUPS, StepWord.PARTS, StepWord.PART_COUNT))
    scores = w.add(told[StepWord.SCORES], w.times(step.index, told[StepWord.SCORES_BYTES]))
    units = w.times(count, kv_heads)
    each = w.either(count, "<", threads, w.whole(1), w.whole(kv_heads))

    def of_group(base: Any, word: GroupWord) -> Any:
        return w.load_int(w.pointer(groups), w.add(base, word))

    def turned(tokens: Any, offset: Any, first: Any, heads: Any) -> None:
        place = w.add(step.at(told[StepWord.HEADS], offset, stride), w.times(first, dim * sizes.dtype.itemsize))
        weights = step.at(own[Layer.HEAD_NORMS], first, dim)
        tables = step.at(told[StepWord.COS], offset, dim), step.at(told[StepWord.SIN], offset, dim)
        w.call(turn, place, weights, *tables, tokens, heads, stride, sizes.head_epsilon)

    with (
        step.shared(units, each) as (begin, end, _),
        w.loop(w.part(begin, kv_heads), w.part(w.add(end, kv_heads - 1), kv_heads)) as part,
    ):
        before = w.times(part, kv_heads)
        low, high = w.greater(w.minus(begin, before), w.whole(0)), w.lesser(w.minus(end, before), w.whole(kv_heads))
        bounds = w.pointer(parts)
        with w.loop(w.load_int(bounds, part), w.load_int(bounds, w.add(part, 1))) as index:
            group = w.times(index, GROUP_WORDS)
            offset, tokens = of_group(group, GroupWord.FIRST), of_group(group, GroupWord.TOKENS)
            some = w.minus(high, low)
            turned(tokens, offset, w.times(low, queries_each), w.times(some, queries_each))
            turned(tokens, offset, w.add(low, sizes.query_heads), some)
            query = step.at(told[StepWord.HEADS], offset, stride)
            key = w.add(query, sizes.seen_width * sizes.dtype.itemsize)
            value = w.add(key, kv_heads * dim * sizes.dtype.itemsize)
            addresses = w.pointer(of_group(group, GroupWord.ADDRESSES))
            held = (w.load_int(addresses, w.add(w.times(layer, 2), which)) for which in range(2))
            out = step.at(told[StepWord.SEEN], offset, sizes.seen_width)
            which = (step.at(told[word], offset, 1, 8) for word in (StepWord.PLACES, StepWord.POSITIONS))
            counts = tokens, kv_heads, low, high, of_group(group, GroupWord.HELD)
            w.call(
                attend, query, key, value, *held, out, *which, scores, *counts, stride, stride, stride, sizes.scale,
                own[Layer.WINDOW],
            )  # fmt: skip


@cache
def whole(sizes: Sizes, epsilon: float, vocabulary: int | None, *, shared: bool) -> Kernel:
    """(step): from tokens to LOGITS; `shared` by as many threads as it says.

    One call, because what Python does between two has to come from memory again after each.
    """
    work = _work(sizes, epsilon, vocabulary, shared=shared)
    w = Writer("whole", [PTR])
    (step,) = w.arguments
    if shared:
        claims, room, threads, helpers = (
            w.load_int(step, w.whole(word))
            for word in (StepWord.CLAIMS, StepWord.CLAIMS_WORDS, StepWord.THREADS, StepWord.TEAM)
        )
        with w.loop(w.whole(0), room) as word:
            w.store_int(w.whole(0), w.pointer(claims), word)
        w.call(team.lead(), helpers, w.whole(work.address), step, threads)
    else:
        w.call(work, step, w.whole(0))
    return w.compiled()
