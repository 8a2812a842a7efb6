"""The decoder layers of a step in one call of our own kernels: what Python does between them took up to a fifth of it.

Layers, norms and products are those of the fused forward pass (`fused.py`), which checked them; here their kernels are
called one after the other by a kernel, over buffers that stay. Each product is told whose weights come next, so that
memory does not wait for norms and attention.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from local_engine import chunks, kernels
from local_engine.fused import FusedLayer
from local_engine.norms import KernelNorm, KernelTurn
from local_engine.products import KernelGated, KernelProduct, Product
from local_engine.rows_plan import GROUP_WORDS, MOST_TOGETHER, GroupWord, Reading
from local_engine.simd import I64, PTR, Kernel, Writer, address
from local_engine.tapped import Tapped


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
    GROUP_COUNT = auto()
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


class _Stream(IntEnum):
    """What products fetch beside their weights of the keys and values that are attended to next."""

    QKV = 0
    """The first keys of its own layer: the last that are fetched, and the first that are read."""
    GATED = auto()
    """The other keys of the next layer."""
    DOWN = auto()
    """The values of the next layer."""


_OFFSET: Final = len(kernels.Beside)
"""The word of a stream, after those of `Beside`, that says where in a layer's keys or values it begins: in bytes."""
_STREAM_WORDS: Final = _OFFSET + 1
_ADDRESSES: Final = len(_Stream) * _STREAM_WORDS
"""The word, after all streams, that says where the addresses of all layers' keys and values are."""


class _Layer(IntEnum):
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
class _Sizes:
    """What all layers of a model have in common."""

    width: int
    inner: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    epsilon: float
    head_epsilon: float
    normed: bool
    biased: bool

    @property
    def heads_width(self) -> int:
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def seen_width(self) -> int:
        return self.query_heads * self.head_dim


@cache
def _decode(sizes: _Sizes) -> Kernel:
    """(step, layers, first, last): layers first to last - 1 over the hidden states, in place."""
    dtype, width, stride, itemsize = sizes.dtype, sizes.width, sizes.heads_width, sizes.dtype.itemsize
    tap, norm = kernels.take(width, dtype), kernels.rms_norm(width, dtype)
    turn = kernels.rotate(sizes.head_dim, dtype, normed=sizes.normed)
    attend = chunks.attend(sizes.head_dim, sizes.query_heads // sizes.kv_heads, dtype)
    first_product = kernels.product(dtype, "bias" if sizes.biased else "plain")
    gate, add = kernels.product(dtype, "gated"), kernels.product(dtype, "sum")

    w = Writer("decode", [PTR, PTR, I64, I64])
    step, layers, first, last = w.arguments
    told = {word: w.load_int(step, w.whole(word)) for word in StepWord}
    rows, hidden, normed = told[StepWord.ROWS], told[StepWord.HIDDEN], told[StepWord.NORMED]
    heads, seen, gated, groups = (
        told[word] for word in (StepWord.HEADS, StepWord.SEEN, StepWord.GATED, StepWord.GROUPS)
    )

    def of_group(base: Any, word: GroupWord) -> Any:
        return w.load_int(w.pointer(groups), w.add(base, word))

    def keys_of(base: Any, layer: Any, which: int) -> Any:
        """The address of the keys (0) or values (1) of a layer."""
        return w.load_int(w.pointer(of_group(base, GroupWord.ADDRESSES)), w.add(w.times(layer, 2), which))

    def tapped(layer: Any) -> None:
        target = w.load_int(w.pointer(told[StepWord.TAPS]), layer)
        with w.where(target, "!=", w.whole(0)):
            w.call(tap, hidden, told[StepWord.TAP_ROWS], target, told[StepWord.TAP_COUNT])

    def beside(stream: _Stream, layer: Any, which: int) -> Any:
        """The address of a stream's words, made to be of the keys (0) or values (1) of a layer; 0 if there are none."""
        words = w.variable(w.whole(0))
        with w.where(told[StepWord.FETCH], "!=", w.whole(0)), w.where(layer, "<", last):
            fetch, at = w.pointer(told[StepWord.FETCH]), stream * _STREAM_WORDS
            held = w.load_int(w.pointer(w.load_int(fetch, w.whole(_ADDRESSES))), w.add(w.times(layer, 2), which))
            w.store_int(
                w.add(held, w.load_int(fetch, w.whole(at + _OFFSET))), fetch, w.whole(at + kernels.Beside.ADDRESS)
            )
            words.value = w.add(told[StepWord.FETCH], at * 8)
        return words.value

    with w.loop(first, last) as layer:
        base = w.times(layer, len(_Layer))
        own = {word: w.load_int(layers, w.add(base, word)) for word in _Layer}
        next_qkv = w.load_int(layers, w.add(base, len(_Layer) + _Layer.QKV))
        tapped(layer)
        w.call(norm, hidden, own[_Layer.INPUT_NORM], normed, rows, sizes.epsilon)
        sides = own[_Layer.QKV], own[_Layer.QKV_BIAS], heads
        w.call(first_product, normed, *sides, rows, width, stride, own[_Layer.OUTPUT], beside(_Stream.QKV, layer, 0))
        rotated = sizes.query_heads + sizes.kv_heads
        places = heads, own[_Layer.HEAD_NORMS], told[StepWord.COS], told[StepWord.SIN]
        w.call(turn, *places, rows, rotated, stride, sizes.head_epsilon)
        with w.loop(w.whole(0), told[StepWord.GROUP_COUNT]) as index:
            group = w.times(index, GROUP_WORDS)
            offset = of_group(group, GroupWord.FIRST)
            query = w.add(heads, w.times(offset, stride * itemsize))
            key = w.add(query, sizes.seen_width * itemsize)
            value = w.add(key, sizes.kv_heads * sizes.head_dim * itemsize)
            held = keys_of(group, layer, 0), keys_of(group, layer, 1)
            out = w.add(seen, w.times(offset, sizes.seen_width * itemsize))
            at = w.times(offset, 8)
            which = w.add(told[StepWord.PLACES], at), w.add(told[StepWord.POSITIONS], at), told[StepWord.SCORES]
            counts = of_group(group, GroupWord.TOKENS), sizes.kv_heads, of_group(group, GroupWord.HELD)
            w.call(
                attend, query, key, value, *held, out, *which, *counts, stride, stride, stride, sizes.scale,
                own[_Layer.WINDOW],
            )  # fmt: skip
        w.call(add, seen, own[_Layer.OUTPUT], hidden, hidden, rows, sizes.seen_width, width, own[_Layer.GATED], 0)
        w.call(norm, hidden, own[_Layer.MLP_NORM], normed, rows, sizes.epsilon)
        following = w.add(layer, 1)
        keys, values = beside(_Stream.GATED, following, 0), beside(_Stream.DOWN, following, 1)
        w.call(gate, normed, own[_Layer.GATED], 0, gated, rows, width, 2 * sizes.inner, own[_Layer.DOWN], keys)
        w.call(add, gated, own[_Layer.DOWN], hidden, hidden, rows, sizes.inner, width, next_qkv, values)
    tapped(last)
    return w.compiled()


@cache
def _whole(sizes: _Sizes, epsilon: float, vocabulary: int | None) -> Kernel:
    """(step, layers, first, last, norm, head): from tokens through `_decode` to LOGITS of LOGIT_ROWS.

    One call, because what Python does between two has to come from memory again after each. Without a `vocabulary` the
    head is no product of ours, and what it is to be given is left in NORMED.
    """
    dtype, width = sizes.dtype, sizes.width
    row, angles, norm = kernels.take(width, dtype), kernels.take(sizes.head_dim, dtype), kernels.rms_norm(width, dtype)
    w = Writer("whole", [PTR, PTR, I64, I64, I64, I64])
    step, layers, first, last, weight, head = w.arguments
    told = {word: w.load_int(step, w.whole(word)) for word in StepWord}
    hidden, normed, count = told[StepWord.HIDDEN], told[StepWord.NORMED], told[StepWord.LOGIT_COUNT]
    with w.where(told[StepWord.EMBEDDING], "!=", w.whole(0)):
        w.call(row, told[StepWord.EMBEDDING], told[StepWord.TOKENS], hidden, told[StepWord.ROWS])
    for table, target in ((StepWord.COS_TABLE, StepWord.COS), (StepWord.SIN_TABLE, StepWord.SIN)):
        w.call(angles, told[table], told[StepWord.POSITIONS], told[target], told[StepWord.ROWS])
    w.call(_decode(sizes), step, layers, first, last)
    with w.where(count, ">", w.whole(0)):
        w.call(row, hidden, told[StepWord.LOGIT_ROWS], normed, count)
        w.call(norm, normed, weight, normed, count, epsilon)
        if vocabulary is not None:
            product = kernels.product(dtype, "plain")
            w.call(product, normed, head, 0, told[StepWord.LOGITS], count, width, vocabulary, head, 0)
    return w.compiled()


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The tokens of a step, and for which of them logits and hidden states are wanted."""

    tokens: Sequence[int]
    logit_rows: Sequence[int]
    tap_rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class OneToken:
    """What it takes to run steps of one token of one sequence: the words of StepWord, and addresses."""

    step: "array[int]"
    layers: int
    norm: int
    head: int


class WholeForward:
    """Runs steps of few tokens per sequence through the decoder layers of one model. One thread only."""

    def __init__(self, embedding: Tensor, layers: Sequence[FusedLayer], norm: KernelNorm, head: Any) -> None:
        """`head`: what gives logits of normed states; a product of our own has them computed in the same call."""
        one = layers[0]
        assert isinstance(one.input_norm, KernelNorm)
        assert isinstance(one.turn, KernelTurn)
        shape = one.shape
        self._shape = shape
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._kept = layers
        self._sizes = _Sizes(
            width=embedding.shape[1],
            inner=_gated(one).outputs // 2,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            scale=one.scale,
            epsilon=one.input_norm.epsilon,
            head_epsilon=one.turn.epsilon,
            normed=one.turn.weights is not None,
            biased=_product(one.qkv).bias is not None,
        )
        own = isinstance(head, KernelProduct) and head.bias is None
        self._vocabulary = head.outputs if own else None
        self._run = _whole(self._sizes, norm.epsilon, self._vocabulary)
        self._ends = norm.weight.data_ptr(), head.packed.data_ptr() if own else 0
        self._layers = array("q")
        for layer in layers:
            self._layers.extend(self._words(layer))
        last = head if isinstance(head, KernelProduct) else layers[0].qkv
        self._layers.extend([0] * _Layer.QKV + [_product(last).packed.data_ptr()])
        self._no_taps = array("q", [0] * (len(layers) + 1))
        self._chunk = chunks.chunk_tokens(shape.head_dim, shape.dtype)
        self._fetch = array("q", bytes(8 * (_ADDRESSES + 1)))
        self._fetched = (0, 0, 0, 0, 0)
        self._rows = 0
        self._scores = torch.empty(0)
        self._reach(1, shape.context)

    @classmethod
    def of(cls, embedding: Tensor, layers: Sequence[FusedLayer], norm: Any, head: Any) -> "WholeForward | None":
        """None where a part of some layer is not by a kernel of ours, or layers differ in what they should share."""
        if not isinstance(norm, KernelNorm) or not all(map(_by_kernels, layers)):
            return None
        return cls(embedding, layers, norm, head) if len({_common(layer) for layer in layers}) == 1 else None

    def _words(self, layer: FusedLayer) -> list[int]:
        qkv = _product(layer.qkv)
        assert isinstance(layer.input_norm, KernelNorm)
        assert isinstance(layer.mlp_norm, KernelNorm)
        assert isinstance(layer.turn, KernelTurn)
        found = {
            _Layer.INPUT_NORM: layer.input_norm.weight,
            _Layer.QKV: qkv.packed,
            _Layer.QKV_BIAS: qkv.bias,
            _Layer.HEAD_NORMS: layer.turn.weights,
            _Layer.OUTPUT: _product(layer.output).packed,
            _Layer.MLP_NORM: layer.mlp_norm.weight,
            _Layer.GATED: _gated(layer).packed,
            _Layer.DOWN: _product(layer.down).packed,
        }
        addresses = [0 if tensor is None else tensor.data_ptr() for _, tensor in sorted(found.items())]
        return [*addresses, layer.window or self._shape.context]

    def run(
        self,
        packed: "PackedRows",
        reading: Reading,
        angles: tuple[Tensor, Tensor],
        layers: tuple[int, int],
        taps: Tapped,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(logits, in the model's type; hidden states, of whose rows the first are the tokens', until the next run).

        All in packed order: `angles` are tables by position, as `fused.fused_rotary` gives them; `state` resumes.
        A token that the model does not have would be read from whatever lies there.
        """
        count = len(packed.tokens)
        self._reach(count, max(reading.positions) + 1)
        if state is not None:
            self._hidden[:count].copy_(state)
        targets = self._no_taps
        if taps:
            targets = array("q", self._no_taps)
            for layer, place in taps.addresses():
                targets[layer] = place
        tokens, tapped, asked = (array("q", rows) for rows in (packed.tokens, packed.tap_rows, packed.logit_rows))
        logits = self._embedding.new_empty(len(asked), self._vocabulary or 0)
        step = self._step(count, reading, (targets, tapped), state is None, address(tokens), angles, asked, logits)
        self._run(address(step), address(self._layers), *layers, *self._ends)
        return logits if self._vocabulary is not None else self._head(self._normed[: len(asked)]), self._hidden

    @property
    def kernel(self) -> Kernel | None:
        """(step, layers, first, last, norm, head), as `OneToken` has them; None where it gives no logits."""
        return self._run if self._vocabulary is not None else None

    def one_token(
        self, reading: Reading, angles: tuple[Tensor, Tensor], asked: "array[int]", logits: Tensor
    ) -> OneToken:
        """For the token that `reading` is of, and those after it, until the next `run`; TOKENS are yet to be told."""
        step = self._step(1, reading, (self._no_taps, array("q")), True, 0, angles, asked, logits)
        return OneToken(step, address(self._layers), *self._ends)

    def _step(
        self,
        count: int,
        reading: Reading,
        taps: tuple["array[int]", "array[int]"],
        embedded: bool,
        tokens: int,
        angles: tuple[Tensor, Tensor],
        asked: "array[int]",
        logits: Tensor,
    ) -> "array[int]":
        """What `_whole` is told. `taps`: per layer where they go, and of which rows; `tokens`: their address."""
        targets, tapped = taps
        return array(
            "q",
            [
                count,
                *self._buffers,
                address(reading.rows),
                address(reading.positions),
                address(reading.groups),
                len(reading.groups) // GROUP_WORDS,
                address(targets),
                address(tapped),
                len(tapped),
                self._fetching(count, reading),
                self._embedding.data_ptr() if embedded else 0,
                tokens,
                *(table.data_ptr() for table in angles),
                address(asked),
                len(asked),
                logits.data_ptr(),
            ],
        )

    def _fetching(self, count: int, reading: Reading) -> int:
        """The address of the streams' words, of the pool that most tokens are of; 0 where products have no time for it.

        While 32 rows of a 29M model are computed, a third of the keys and values comes before it is asked for, which
        shortens a float32 step by 3 % (`docs/experiments.md`).
        """
        sizes = self._sizes
        spare = kernels.spare_bytes(count, sizes.dtype)
        if not spare:
            return 0
        groups = reading.groups
        most = max(range(0, len(groups), GROUP_WORDS), key=lambda at: groups[at + GroupWord.TOKENS])
        own = slice(groups[most], groups[most] + groups[most + GroupWord.TOKENS])
        rows, longest = reading.rows[own], max(reading.positions[own]) + 1
        self._fetch[_ADDRESSES] = groups[most + GroupWord.ADDRESSES]
        asked = count, min(rows), max(rows) + 1, groups[most + GroupWord.HELD], -(-longest // self._chunk)
        if asked != self._fetched:
            self._fetched = asked
            self._lay_out(spare, *asked)
        return address(self._fetch)

    def _lay_out(self, spare: int, count: int, first: int, end: int, held: int, runs: int) -> None:
        """The streams' words, but for their addresses: for `runs` chunks of rows first to end - 1 of those held."""
        sizes = self._sizes
        line = sizes.kv_heads * self._chunk * sizes.head_dim * sizes.dtype.itemsize
        run, stride = (end - first) * line, held * line
        qkv, gated, down = (
            kernels.steps(count, *product, sizes.dtype)
            for product in (
                (sizes.width, sizes.heads_width),
                (sizes.width, 2 * sizes.inner),
                (sizes.inner, sizes.width),
            )
        )
        reached = min(runs, spare * qkv // run)  # whole chunks of keys that a layer's own product comes to
        streams = {_Stream.QKV: (qkv, 0), _Stream.GATED: (gated, reached), _Stream.DOWN: (down, 0)}
        for stream, (steps, skipped) in streams.items():
            left = runs - skipped
            told = {
                kernels.Beside.ADDRESS: 0,
                kernels.Beside.RUN: run,
                kernels.Beside.STRIDE: stride,
                kernels.Beside.END: left * stride,
                kernels.Beside.PACE: min(spare, -(-left * run // steps)),
            }
            at = stream * _STREAM_WORDS
            offset = first * line + skipped * stride
            self._fetch[at : at + _STREAM_WORDS] = array("q", [*(told[word] for word in kernels.Beside), offset])

    def _reach(self, count: int, longest: int) -> None:
        """Buffers for so many tokens, the last of which sees `longest`."""
        sizes = self._sizes
        scores = chunks.scores_room(min(count, MOST_TOGETHER), sizes.query_heads, longest, sizes.head_dim)
        if count <= self._rows and scores <= self._scores.numel():
            return
        if scores > self._scores.numel():
            self._scores = torch.empty(scores + scores // 2)
        self._rows = max(32, self._rows, 1 << (count - 1).bit_length())
        like = self._embedding
        widths = sizes.width, sizes.width, sizes.heads_width, sizes.seen_width, sizes.inner
        self._hidden, self._normed, self._heads, self._seen, self._gated = (
            like.new_empty(self._rows, width) for width in widths
        )
        self._cos, self._sin = (like.new_empty(self._rows, sizes.head_dim) for _ in range(2))
        buffers = self._hidden, self._normed, self._heads, self._seen, self._gated, self._scores, self._cos, self._sin
        self._buffers = [buffer.data_ptr() for buffer in buffers]


def _product(product: Product) -> KernelProduct:
    assert isinstance(product, KernelProduct), "it was looked at before"
    return product


def _gated(layer: FusedLayer) -> KernelGated:
    assert isinstance(layer.gated, KernelGated), "it was looked at before"
    return layer.gated


def _by_kernels(layer: FusedLayer) -> bool:
    """Whether all that `_decode` calls is there, and nothing that it does not."""
    products = (layer.qkv, layer.output, layer.down)
    return (
        isinstance(layer.input_norm, KernelNorm)
        and isinstance(layer.mlp_norm, KernelNorm)
        and layer.input_norm.epsilon == layer.mlp_norm.epsilon
        and isinstance(layer.turn, KernelTurn)
        and isinstance(layer.gated, KernelGated)
        and all(isinstance(product, KernelProduct) for product in products)
        and all(_product(product).bias is None for product in products[1:])
    )


def _common(layer: FusedLayer) -> tuple[float, ...]:
    """What is written into the code of `_decode`, so that no layer may differ in it."""
    assert isinstance(layer.input_norm, KernelNorm)
    assert isinstance(layer.turn, KernelTurn)
    biased, normed = _product(layer.qkv).bias is not None, layer.turn.weights is not None
    return layer.scale, layer.input_norm.epsilon, layer.turn.epsilon, biased, normed
