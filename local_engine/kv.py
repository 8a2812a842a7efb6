"""What the engine needs of a KV cache, and what a KV cache must know of its model.

Two caches keep this promise: contiguous rows on CPU (`kv_rows.py`) and pages on CUDA (`kv_paged.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from local_engine.errors import EngineError
from local_engine.model import LocalModel


class KVFull(EngineError):
    """The byte budget has no room for what was asked; free another slot, or ask for less, and try again."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """The part of a model's configuration that its keys and values depend on."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    """Most tokens of one sequence."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: LocalModel) -> "KVShape":
        config = model.network.config
        return cls(
            layers=config.num_hidden_layers,
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            context=config.max_position_embeddings,
            dtype=model.network.get_input_embeddings().weight.dtype,
            device=model.device,
        )

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class Span(NamedTuple):
    """`tokens` of a slot, at positions from `start` on, that one step computes."""

    slot: int
    start: int
    tokens: int


class StepPlan(Protocol):
    """Everything about one step's attention that is the same for all layers."""

    order: Sequence[int]
    """The spans' indexes in the order in which their tokens are to be packed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store the keys and values of the packed tokens in `layer`, then attend over all that the slots hold.

        query [tokens, query_heads, head_dim]; key, value [tokens, kv_heads, head_dim]; the result is shaped as query.
        A token sees itself and what is before it, of which with a `window` the last `window - 1` tokens only.
        """
        ...


class KVCache(Protocol):
    """Keys and values of the running sequences of one model; one thread only; never more than `bytes_limit`.

    A slot is a handle, never used twice. A closed or unknown slot raises KeyError everywhere.
    """

    shape: KVShape
    bytes_limit: int
    token_bytes: int

    @property
    def bytes_used(self) -> int:
        """Bytes that the open slots claim: 0 when all are closed."""
        ...

    @property
    def bytes_allocated(self) -> int:
        """Bytes of memory held for slots, open or yet to come."""
        ...

    @property
    def most_tokens(self) -> int:
        """What one slot can hold when no other is open."""
        ...

    def open(self, capacity: int, expected: int = 0) -> int:
        """A slot of length 0 with room for `capacity` tokens. Raises KVFull, and ValueError beyond the context.

        It will be asked to hold `expected` in the end, where that is more: it may have room for them already.
        """
        ...

    def reserve(self, slot: int, length: int) -> None:
        """Room for `length` tokens in all. Raises as `open`; the slot is unchanged then."""
        ...

    def length(self, slot: int) -> int: ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens. O(1). Raises ValueError when there are fewer."""
        ...

    def fork(self, slot: int, length: int, expected: int = 0) -> int:
        """A new slot that begins with the first `length` tokens of `slot`; `expected` as in `open`. Raises KVFull."""
        ...

    def close(self, slot: int) -> None: ...

    def export(self, slot: int, start: int, stop: int) -> Tensor:
        """Copy of tokens start..stop-1 on the CPU: [layers, 2 (key, value), kv_heads, stop - start, head_dim]."""
        ...

    def export_into(self, slot: int, start: int, blocks: Sequence[Tensor]) -> None:
        """As `export`, of the tokens from `start` on, into contiguous tensors of equal size. Raises ValueError."""
        ...

    def load(self, slot: int, start: int, data: Tensor) -> None:
        """Append what `export` gave, at `start`, which must be the slot's length. Raises KVFull, ValueError."""
        ...

    def plan(self, spans: Sequence[Span]) -> StepPlan:
        """Prepare one step over `spans`, one per slot, with room reserved and no gap before `start`."""
        ...

    def commit(self, slot: int, length: int) -> None:
        """Say that tokens up to `length` now have keys and values, in the layers that ran."""
        ...


def check_spans(kv: KVCache, spans: Sequence[Span]) -> None:
    """Raise ValueError for spans that a step cannot run."""
    if len({slot for slot, _, _ in spans}) != len(spans):
        raise ValueError("a slot may have one segment in a step; join the tokens of a slot into one segment")
    for slot, start, tokens in spans:
        if tokens < 1 or not 0 <= start <= kv.length(slot):
            raise ValueError(
                f"{tokens} tokens at {start} cannot follow the {kv.length(slot)} of slot {slot}:"
                " a segment has at least one token and leaves no gap"
            )


def check_blocks(shape: KVShape, blocks: Sequence[Tensor]) -> int:
    """How many tokens each of `blocks` takes; raises ValueError where one is not for KV of this shape."""
    tokens = blocks[0].shape[3] if blocks[0].dim() == 5 else 0
    wanted = (shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)
    for block in blocks:
        if block.shape != wanted or block.dtype != shape.dtype or not block.is_contiguous():
            raise ValueError(
                f"contiguous blocks of {shape.dtype} {wanted} are needed, and one is of {block.dtype} "
                f"{tuple(block.shape)}, strides {block.stride()}"
            )
    return tokens


def check_range(held: int, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= held:
        raise ValueError(f"tokens {start} to {stop} are asked for; the slot holds {held}")
