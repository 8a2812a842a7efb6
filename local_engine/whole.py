"""The decoder layers of a step in one call of our own kernels: what Python does between them took up to a fifth of it.

Layers, norms and products are those of the fused forward pass (`fused.py`), which checked them; `step.py` calls their
kernels.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from local_engine import chunks, kernels, team
from local_engine.fused import FusedLayer
from local_engine.norms import KernelNorm, KernelTurn
from local_engine.products import KernelGated, KernelProduct, Product
from local_engine.rows_plan import GROUP_WORDS, MOST_TOGETHER, GroupWord, Reading, Shared
from local_engine.simd import Kernel, address
from local_engine.step import (
    ADDRESSES,
    PHASES,
    PHASES_AROUND,
    STREAM_WORDS,
    Layer,
    Sizes,
    StepWord,
    Stream,
    whole,
)
from local_engine.tapped import Tapped

_WEIGHTS_EACH: Final = 8 << 20
"""Bytes of weights that are worth a thread. By two the bundled base's step (10 MB) takes 0.26 to 0.34 ms instead of
0.44, but half a CPU more is at work for tokens that come 0 to 20 % sooner."""
_FEWEST_TOGETHER: Final = 8
"""Tokens that a thread attends to at once, of MOST_TOGETHER that all threads have room for, where there are many."""
_NOBODY: Final = array("q")


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The tokens of a step, and for which of them logits and hidden states are wanted."""

    tokens: Sequence[int]
    logit_rows: Sequence[int]
    tap_rows: Sequence[int]


class WholeForward:
    """Runs steps of few tokens per sequence through the decoder layers of one model. One caller at a time."""

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
        self._sizes = Sizes(
            width=embedding.shape[1],
            inner=_gated(one).outputs // 2,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            types=_product(one.qkv).types,
            scale=one.scale,
            epsilon=one.input_norm.epsilon,
            head_epsilon=one.turn.epsilon,
            normed=one.turn.weights is not None,
            biased=_product(one.qkv).bias is not None,
        )
        own = isinstance(head, KernelProduct) and head.bias is None and head.types == self._sizes.types
        self._vocabulary = head.outputs if own else None
        self._ends = norm.weight.data_ptr(), head.packed.data_ptr() if own else 0
        products = [product for layer in layers for product in _products(layer)]
        weight_bytes = sum(product.packed.nbytes for product in products) + (head.packed.nbytes if own else 0)
        self._threads = threads = max(1, min(kernels.threads(), weight_bytes // _WEIGHTS_EACH))
        self._run = whole(self._sizes, norm.epsilon, self._vocabulary, shared=threads > 1)
        self._team = team.team(threads) if threads > 1 else 0
        self._together = max(_FEWEST_TOGETHER, MOST_TOGETHER // threads)
        self._room = torch.empty(threads * self._sizes.room_bytes, dtype=torch.uint8)
        self._claims = torch.zeros(team.claims_room(PHASES * len(layers) + PHASES_AROUND, threads), dtype=torch.int64)
        self._layers = array("q")
        for layer in layers:
            self._layers.extend(self._words(layer))
        last = head if isinstance(head, KernelProduct) else layers[0].qkv
        self._layers.extend([0] * Layer.QKV + [_product(last).packed.data_ptr()])
        self._no_taps = array("q", [0] * (len(layers) + 1))
        self._chunk = chunks.chunk_tokens(shape.head_dim, shape.dtype)
        self._fetch = array("q", bytes(8 * (ADDRESSES + 1)))
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
            Layer.INPUT_NORM: layer.input_norm.weight,
            Layer.QKV: qkv.packed,
            Layer.QKV_BIAS: qkv.bias,
            Layer.HEAD_NORMS: layer.turn.weights,
            Layer.OUTPUT: _product(layer.output).packed,
            Layer.MLP_NORM: layer.mlp_norm.weight,
            Layer.GATED: _gated(layer).packed,
            Layer.DOWN: _product(layer.down).packed,
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
        shared = reading.shared_out(self._threads, self._together)
        step = self._step(count, shared, (targets, tapped), state is None, angles, asked, logits, layers)
        step[StepWord.TOKENS] = address(tokens)
        self._run(address(step))
        return logits if self._vocabulary is not None else self._head(self._normed[: len(asked)]), self._hidden

    @property
    def kernel(self) -> Kernel | None:
        """(step), as `one_token` gives it; None where it gives no logits."""
        return self._run if self._vocabulary is not None else None

    def one_token(
        self, shared: Shared, angles: tuple[Tensor, Tensor], asked: "array[int]", logits: Tensor, layers: int
    ) -> "array[int]":
        """The words of StepWord for the token that `shared` is of, and those after it, until the next `run`, by the
        first `layers`; TOKENS are yet to be told. Addresses are good for as long as somebody keeps what was given."""
        return self._step(1, shared, (self._no_taps, _NOBODY), True, angles, asked, logits, (0, layers))

    def _step(
        self,
        count: int,
        shared: Shared,
        taps: tuple["array[int]", "array[int]"],
        embedded: bool,
        angles: tuple[Tensor, Tensor],
        asked: "array[int]",
        logits: Tensor,
        layers: tuple[int, int],
    ) -> "array[int]":
        """What `step.whole` is told, but for TOKENS. `taps`: per layer where they go, and of which rows."""
        targets, tapped = taps
        reading = shared.reading
        return array(
            "q",
            [
                count,
                *self._buffers,
                address(reading.rows),
                address(reading.positions),
                address(shared.groups),
                address(targets),
                address(tapped),
                len(tapped),
                self._fetching(count, reading),
                self._embedding.data_ptr() if embedded else 0,
                0,
                *(table.data_ptr() for table in angles),
                address(asked),
                len(asked),
                logits.data_ptr(),
                address(self._layers),
                *layers,
                *self._ends,
                address(shared.parts),
                len(shared.parts) - 1,
                self._scores.nbytes // self._threads // kernels.LINE * kernels.LINE,
                self._room.data_ptr(),
                self._team,
                self._threads,
                self._claims.data_ptr(),
                self._claims.numel(),
            ],
        )

    def _fetching(self, count: int, reading: Reading) -> int:
        """The address of the streams' words, of the pool that most tokens are of; 0 where products have no time for it.

        While 32 rows of a 29M model are computed, a third of the keys and values comes before it is asked for, which
        shortens a float32 step by 3 % (`docs/experiments.md`).
        """
        sizes = self._sizes
        spare = kernels.spare_bytes(count, sizes.dtype)
        if not spare or self._threads > 1:  # with more of them it was not measured
            return 0
        groups = reading.groups
        most = max(range(0, len(groups), GROUP_WORDS), key=lambda at: groups[at + GroupWord.TOKENS])
        own = slice(groups[most], groups[most] + groups[most + GroupWord.TOKENS])
        rows, longest = reading.rows[own], max(reading.positions[own]) + 1
        self._fetch[ADDRESSES] = groups[most + GroupWord.ADDRESSES]
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
            kernels.steps(count, *product, sizes.types.weights)
            for product in (
                (sizes.width, sizes.heads_width),
                (sizes.width, 2 * sizes.inner),
                (sizes.inner, sizes.width),
            )
        )
        reached = min(runs, spare * qkv // run)  # whole chunks of keys that a layer's own product comes to
        streams = {Stream.QKV: (qkv, 0), Stream.GATED: (gated, reached), Stream.DOWN: (down, 0)}
        for stream, (steps, skipped) in streams.items():
            left = runs - skipped
            told = {
                kernels.Beside.ADDRESS: 0,
                kernels.Beside.RUN: run,
                kernels.Beside.STRIDE: stride,
                kernels.Beside.END: left * stride,
                kernels.Beside.PACE: min(spare, -(-left * run // steps)),
            }
            at = stream * STREAM_WORDS
            offset = first * line + skipped * stride
            self._fetch[at : at + STREAM_WORDS] = array("q", [*(told[word] for word in kernels.Beside), offset])

    def _reach(self, count: int, longest: int) -> None:
        """Buffers for so many tokens, the last of which sees `longest`."""
        sizes = self._sizes
        room = chunks.scores_room(min(count, self._together), sizes.query_heads, longest, sizes.head_dim)
        scores = self._threads * (room + kernels.LINE)
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


def _products(layer: FusedLayer) -> "tuple[KernelProduct | KernelGated, ...]":
    return _product(layer.qkv), _product(layer.output), _gated(layer), _product(layer.down)


def _by_kernels(layer: FusedLayer) -> bool:
    """Whether all that a step calls is there, and nothing that it does not."""
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
    """What is written into the code of a step, so that no layer may differ in it."""
    assert isinstance(layer.input_norm, KernelNorm)
    assert isinstance(layer.turn, KernelTurn)
    biased, normed = _product(layer.qkv).bias is not None, layer.turn.weights is not None
    return layer.scale, layer.input_norm.epsilon, layer.turn.epsilon, biased, normed
