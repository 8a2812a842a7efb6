"""One packed forward pass for everything a step computes: decode rows, prompt chunks, drafts to verify, forced text.

Hidden states are numbered as transformers numbers them: 0 is the embeddings, k the output of the k-th decoder layer;
the last one, too, is taken before the final norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from local_engine import attention
from local_engine.errors import ModelLoadError
from local_engine.fused import CHECK_TOKENS, FusedLayer, fuse, fused_rotary
from local_engine.greedy import Greedy, advance
from local_engine.kv import KVCache, KVShape, Span, StepPlan
from local_engine.kv_paged import PagedKV
from local_engine.kv_rows import RowsKV
from local_engine.model import LocalModel
from local_engine.norms import best_norm
from local_engine.products import KernelProduct
from local_engine.rows_plan import RowsPlan
from local_engine.simd import Kernel
from local_engine.tapped import NOTHING, Tapped
from local_engine.whole import PackedRows, WholeForward
from local_engine.whole_check import gives_the_same


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one slot that a step computes, at positions `start` and on."""

    slot: int
    start: int
    tokens: Sequence[int]
    logits: int = 0
    """For how many of its last tokens logits are wanted."""
    taps: Sequence[int] = ()
    """Indexes within `tokens` whose hidden states are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    logits: Tensor
    """float32 [sum of segment.logits, vocabulary], in segment order."""
    hidden: Tapped
    """Until the runner's next step."""
    state: Tensor | None = None
    """[tokens, width] in segment order, when the step stopped before the last layer: what resumes it there."""


def new_kv(model: LocalModel, bytes_limit: int) -> KVCache:
    """The KV cache for the device that the model is on."""
    shape = KVShape.of(model)
    return PagedKV(shape, bytes_limit) if model.device.type == "cuda" else RowsKV(shape, bytes_limit)


class Runner:
    """Drives the decoder layers of one model over one KV cache; one thread only.

    The network belongs to the runner from then on: its own forward raises outside a step. `fused` is the lean forward
    pass (`fused.py`), used where it proves equal; without it the network's own layer modules run.
    """

    def __init__(self, model: LocalModel, kv: KVCache, *, fused: bool = True) -> None:
        self.kv = kv
        network = model.network
        network.set_attn_implementation(attention.NAME)
        self._body = network.model
        self._device = model.device
        self._tapped = NOTHING
        self.rotary = _RotaryTable(self._body.rotary_emb, kv.shape)
        self.layers = len(self._body.layers)
        self.last_token = self._body.embed_tokens.num_embeddings - 1
        found = fuse(network, kv, self.rotary.first(CHECK_TOKENS)) if fused else None
        self._fused = found.layers if found else None
        self._norm = best_norm(self._body.norm) if found else self._body.norm
        self._head = found.head if found else network.lm_head
        self._whole: WholeForward | None = None
        self._advance: Kernel | None = None
        if self._fused and isinstance(kv, RowsKV) and kv.in_chunks:
            self._take_whole(network, self._fused)

    def _take_whole(self, network: Any, layers: Sequence[FusedLayer]) -> None:
        """Run steps in one native call where that gives the same; else take the network's own norm and head, too."""
        whole = WholeForward.of(self._body.embed_tokens.weight.detach(), layers, self._norm, self._head)
        if whole is None:
            return
        greedy = None
        if whole.kernel and isinstance(self._head, KernelProduct):
            greedy = advance(whole.kernel, self._head.outputs, self._head.types.states), self._head
        if gives_the_same(network, layers, self.rotary.first(CHECK_TOKENS), whole, greedy, self.rotary.turned):
            self._whole, self._advance = whole, greedy[0] if greedy else None
        else:
            self._norm, self._head = self._body.norm, network.lm_head

    def run(
        self,
        segments: Sequence[Segment],
        *,
        tap_layers: Sequence[int] = (),
        layers: tuple[int, int] | None = None,
        state: Tensor | None = None,
    ) -> StepOutput:
        """Compute one step over `segments`, at most one per slot, and keep its keys and values.

        `layers=(a, b)` runs decoder layers a+1 to b only; a > 0 resumes, from the `state` that the step which stopped
        at a gave for the same tokens, and logits with b below the last layer are those of an exit there. A slot's
        length grows when layer 1 runs: tokens stopped early have to be resumed or truncated before later ones run in
        the layers above. Raises KVFull before anything is computed, ValueError for what cannot be run, IndexError for
        a token that the model does not have: on CUDA, looking it up would break the device for the whole process.
        """
        first, last = layers or (0, self.layers)
        self._check(segments, tap_layers, first, last, state)
        for segment in segments:
            self.kv.reserve(segment.slot, segment.start + len(segment.tokens))
        plan = self.kv.plan([Span(segment.slot, segment.start, len(segment.tokens)) for segment in segments])
        packing = _Packing(segments, plan, self._device)
        most = max(packing.lists.tokens)
        if most > self.last_token:
            raise IndexError(f"token {most}: the model has tokens 0 to {self.last_token}; its tokenizer has more")
        self.rotary.reach(packing.furthest)
        # Outside of inference mode, because what is made in it may not be changed outside.
        taps = self._room(tap_layers, packing.tapped)
        reading = plan.reading if self._whole is not None and isinstance(plan, RowsPlan) else None
        if self._whole is not None and reading is not None:
            with torch.no_grad():
                given = None if state is None else packing.packed(state)
                logits, hidden = self._whole.run(packing.lists, reading, self.rotary.turned, (first, last), taps, given)
        else:
            with torch.inference_mode():
                hidden = self._body.embed_tokens(packing.tokens) if state is None else packing.packed(state)
                hidden = self._forward(hidden, packing, plan, range(first, last), taps)
                if last in taps:
                    torch.index_select(hidden, 0, packing.tap_rows, out=taps[last])
                logits = self._head(self._norm(hidden[packing.logit_rows]))
        if first == 0:
            for segment in segments:
                self.kv.commit(segment.slot, segment.start + len(segment.tokens))
        return StepOutput(
            logits=logits.to(torch.float32, copy=logits.is_inference()),
            hidden=taps,
            state=packing.unpacked(hidden) if last < self.layers else None,
        )

    @property
    def held(self) -> tuple[torch.dtype, torch.dtype]:
        """What type the weights of the layers, and of the head, are held and read in."""
        embedded: torch.dtype = self._body.embed_tokens.weight.dtype
        first = self._fused[0].qkv if self._fused else None
        layers, head = (
            product.types.weights if isinstance(product, KernelProduct) else embedded for product in (first, self._head)
        )
        return layers, head

    @property
    def writes_alone(self) -> bool:
        """Whether our own kernels are for `greedy`."""
        return self._advance is not None

    def greedy(self, slot: int, room: int, *, layers: int | None = None) -> Greedy | None:
        """Writes on from what a slot holds, up to `room` tokens in all; None where our own kernels are not for this.

        `layers`: by the first so many of them alone. Raises KVFull, ValueError.
        """
        if self._advance is None:
            return None
        assert self._whole is not None
        assert isinstance(self._head, KernelProduct)
        assert isinstance(self.kv, RowsKV)
        self.kv.reserve(slot, room)
        self.rotary.reach(room)
        reading = self.kv.plan([Span(slot, self.kv.length(slot), 1)]).reading
        assert reading is not None, "one token is not too long"
        last = self.layers if layers is None else layers
        return Greedy(self._advance, self._whole, self._head, self.kv, slot, reading, self.rotary.turned, last)

    def logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary] that hidden states [rows, width] of any layer would give as the last layer's."""
        with torch.inference_mode():
            return self._head(self._norm(states)).to(torch.float32, copy=True)

    def _room(self, layers: Sequence[int], rows: int) -> Tapped:
        """For hidden states of `rows` tokens of each layer; the last step's, where it fits."""
        if layers and not self._tapped.fits(layers, rows):
            self._tapped = Tapped.room(layers, rows, self._body.embed_tokens.weight)
        return self._tapped if layers else NOTHING

    def _forward(self, hidden: Tensor, packing: "_Packing", plan: StepPlan, layers: range, taps: Tapped) -> Tensor:
        """Hidden states after the last of `layers`; those before the tapped ones go into `taps`."""
        cos, sin = self.rotary.at(packing.positions)
        if self._fused is None:
            own = cos.unsqueeze(0), sin.unsqueeze(0)
        else:
            turned = fused_rotary(cos, sin)
        with attention.step(plan):
            for layer in layers:
                if layer in taps:
                    torch.index_select(hidden, 0, packing.tap_rows, out=taps[layer])
                if self._fused is None:
                    hidden = self._body.layers[layer](hidden.unsqueeze(0), position_embeddings=own, use_cache=False)[0]
                else:
                    hidden = self._fused[layer].forward(hidden, turned, plan)
        return hidden

    def _check(
        self, segments: Sequence[Segment], tap_layers: Sequence[int], first: int, last: int, state: Tensor | None
    ) -> None:
        if not segments:
            raise ValueError("a step needs at least one segment")
        if not 0 <= first <= last <= self.layers:
            raise ValueError(f"layers ({first}, {last}) must lie, in order, between 0 and {self.layers}")
        if (state is not None) != (first > 0):
            raise ValueError(f"layers ({first}, {last}): a state is needed to resume, and only then")
        for tap in tap_layers:
            if not first <= tap <= last:
                raise ValueError(f"layer {tap} is tapped; this step has hidden states {first} to {last}")
        for segment in segments:
            held, stop = self.kv.length(segment.slot), segment.start + len(segment.tokens)
            if segment.start != held if first == 0 else stop > held:
                raise ValueError(
                    f"slot {segment.slot} holds {held} tokens; a segment over {segment.start} to {stop} must"
                    f" {'start there' if first == 0 else 'be among them to be resumed'}"
                )
            if segment.logits > len(segment.tokens):
                raise ValueError(f"{segment.logits} logits are wanted of {len(segment.tokens)} tokens")


class _Packing:
    """Where the segments' tokens are in the packed step, whose order is the plan's."""

    def __init__(self, segments: Sequence[Segment], plan: StepPlan, device: torch.device) -> None:
        offsets = [0] * len(segments)
        tokens: list[int] = []
        positions: list[int] = []
        for index in plan.order:
            segment = segments[index]
            count = len(segment.tokens)
            offsets[index] = len(tokens)
            tokens += segment.tokens
            if (
                count == 1
            ):  # most are: what Python does here, after a step has filled the caches, takes part of the step
                positions.append(segment.start)
            else:
                positions += range(segment.start, segment.start + count)
        logit_rows: list[int] = []
        tap_rows: list[int] = []
        for offset, segment in zip(offsets, segments, strict=True):
            if segment.logits == 1:
                logit_rows.append(offset + len(segment.tokens) - 1)
            elif segment.logits:
                end = offset + len(segment.tokens)
                logit_rows += range(end - segment.logits, end)
            if len(segment.taps) == 1:
                tap_rows.append(offset + segment.taps[0])
            elif segment.taps:
                tap_rows += [offset + tap for tap in segment.taps]
        self.furthest = max(positions)
        self.tapped = len(tap_rows)
        self.lists = PackedRows(tokens, logit_rows, tap_rows)
        self._positions = positions
        self._device = device
        self._segments = segments
        self._offsets = offsets

    @cached_property
    def tokens(self) -> Tensor:
        return self._tensor(self.lists.tokens)

    @cached_property
    def positions(self) -> Tensor:
        return self._tensor(self._positions)

    @cached_property
    def logit_rows(self) -> Tensor:
        return self._tensor(self.lists.logit_rows)

    @cached_property
    def tap_rows(self) -> Tensor:
        return self._tensor(self.lists.tap_rows)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def unpacked(self, hidden: Tensor) -> Tensor:
        """From packed order to segment order."""
        return hidden[self._rows()]

    def packed(self, state: Tensor) -> Tensor:
        """From segment order to packed order."""
        rows = self._rows()
        if state.shape[0] != len(rows):
            raise ValueError(f"the state has {state.shape[0]} rows; the segments have {len(rows)} tokens")
        return torch.empty_like(state).index_copy_(0, rows, state)

    def _rows(self) -> Tensor:
        pairs = zip(self._offsets, self._segments, strict=True)
        rows = [row for offset, segment in pairs for row in range(offset, offset + len(segment.tokens))]
        return self._tensor(rows)


class _RotaryTable:
    """Rotary cosines and sines of every position up to the furthest one met, from the model's own module."""

    def __init__(self, module: Any, shape: KVShape) -> None:
        if module.rope_type in ("dynamic", "longrope"):
            raise ModelLoadError(
                f"rope_type {module.rope_type!r} is not supported: its angles depend on how long a sequence will get;"
                " use a checkpoint with a fixed one (default, linear, llama3, yarn)"
            )
        self._module = module
        self._like = torch.empty(0, dtype=shape.dtype, device=shape.device)
        self._context = shape.context
        self._cos = self._sin = self._like
        self.turned = self._like, self._like
        """The same by position, as `fused_rotary` gives them."""
        self._grow(256)

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self._cos[:tokens], self._sin[:tokens]

    def reach(self, position: int) -> None:
        """Have the angles of `position`."""
        if position >= self._cos.shape[0]:
            self._grow(2 * position)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, head_dim] of positions that were reached."""
        return self._cos[positions], self._sin[positions]

    @torch.no_grad()
    def _grow(self, length: int) -> None:
        places = torch.arange(min(length, self._context), device=self._like.device)
        cos, sin = self._module(self._like, places.unsqueeze(0))
        self._cos, self._sin = cos[0], sin[0]
        turned = fused_rotary(self._cos, self._sin)
        self.turned = turned[0].contiguous(), turned[1].contiguous()
