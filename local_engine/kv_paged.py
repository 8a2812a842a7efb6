"""Keys and values in pages, for CUDA: torch's variable-length attention reads them where they are.

A fork shares the pages that its first tokens fill and copies the one they end in. A page that several slots share is
never written: who has to write there gets a copy first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from local_engine.kv import KVFull, KVShape, Span, check_blocks, check_range, check_spans

PAGE: Final = 256
"""Tokens. FlashAttention 2, which torch calls, takes multiples of 256 only (Dao-AILab/flash-attention issue 828)."""


def kernel_attends(shape: KVShape) -> bool:
    """Whether FlashAttention 2 takes these heads, in this type, on this GPU: Ampere or newer."""
    fits = shape.dtype in (torch.float16, torch.bfloat16) and shape.head_dim % 8 == 0 and shape.head_dim <= 256
    return fits and shape.device.type == "cuda" and torch.cuda.get_device_capability(shape.device) >= (8, 0)


@dataclass(slots=True, eq=False)
class _Sequence:
    pages: list[int]
    length: int = 0


class PagedKV:
    """KVCache of pages [2 (key, value), pages, PAGE, kv_heads, head_dim] per layer, all allocated at the start.

    Where `kernel_attends`, attention is one kernel call per layer; elsewhere the pages are gathered first, which is
    exact and slow, and there for tests, float32, older GPUs and odd heads. What a sequence is `expected` to hold makes
    no difference: it takes pages as it writes.
    """

    def __init__(self, shape: KVShape, bytes_limit: int) -> None:
        self.shape = shape
        self.bytes_limit = bytes_limit
        self.token_bytes = shape.token_bytes
        self.page_bytes = PAGE * self.token_bytes
        self._pages = bytes_limit // self.page_bytes
        size = (2, self._pages, PAGE, shape.kv_heads, shape.head_dim)
        # Zeros, never whatever the memory held: a masked key may be anything but NaN.
        self.layers = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
        self.by_kernel = kernel_attends(shape)
        self._free = list(range(self._pages))
        self._holders = [0] * self._pages
        self._sequences: dict[int, _Sequence] = {}
        self._slots = count()

    @property
    def bytes_used(self) -> int:
        return (self._pages - len(self._free)) * self.page_bytes

    @property
    def bytes_allocated(self) -> int:
        return self._pages * self.page_bytes

    @property
    def most_tokens(self) -> int:
        return min(self._pages * PAGE, self.shape.context)

    def open(self, capacity: int, expected: int = 0) -> int:
        sequence = _Sequence([])
        self._make_room(sequence, 0, capacity)
        return self._add(sequence)

    def reserve(self, slot: int, length: int) -> None:
        sequence = self._sequences[slot]
        self._make_room(sequence, sequence.length, length)

    def length(self, slot: int) -> int:
        return self._sequences[slot].length

    def truncate(self, slot: int, length: int) -> None:
        check_range(self._sequences[slot].length, 0, length)
        self._sequences[slot].length = length

    def commit(self, slot: int, length: int) -> None:
        self._sequences[slot].length = length

    def fork(self, slot: int, length: int, expected: int = 0) -> int:
        source = self._sequences[slot]
        check_range(source.length, 0, length)
        whole, rest = divmod(length, PAGE)
        if rest and not self._free:
            raise self._full(1)
        for page in source.pages[:whole]:
            self._holders[page] += 1
        forked = _Sequence(source.pages[:whole], length)
        if rest:
            forked.pages.append(self._copied(source.pages[whole]))
        return self._add(forked)

    def close(self, slot: int) -> None:
        for page in self._sequences.pop(slot).pages:
            self._release(page)

    def export(self, slot: int, start: int, stop: int) -> Tensor:
        sequence = self._sequences[slot]
        check_range(sequence.length, start, stop)
        lines = self._lines(sequence, start, stop)
        data = torch.stack([layer.flatten(1, 2)[:, lines].transpose(1, 2) for layer in self.layers])
        return data.contiguous().cpu()

    def export_into(self, slot: int, start: int, blocks: Sequence[Tensor]) -> None:
        tokens = check_blocks(self.shape, blocks)
        data = self.export(slot, start, start + len(blocks) * tokens)
        for block, part in zip(blocks, torch.split(data, tokens, dim=3), strict=True):
            block.copy_(part)

    def load(self, slot: int, start: int, data: Tensor) -> None:
        sequence = self._sequences[slot]
        if start != sequence.length:
            raise ValueError(f"slot {slot} holds {sequence.length} tokens; data for {start} does not follow")
        stop = start + data.shape[3]
        self.reserve(slot, stop)
        lines = self._lines(sequence, start, stop)
        for layer, part in zip(self.layers, data.to(self.shape.device), strict=True):
            layer.flatten(1, 2).index_copy_(1, lines, part.transpose(1, 2))
        sequence.length = stop

    def plan(self, spans: Sequence[Span]) -> "PagedPlan":
        check_spans(self, spans)
        sequences = [self._sequences[span.slot] for span in spans]
        for span, sequence in zip(spans, sequences, strict=True):
            stop = span.start + span.tokens
            if stop > len(sequence.pages) * PAGE:
                raise ValueError(f"slot {span.slot} has no room for {stop} tokens; reserve it first")
            self._make_room(sequence, span.start, stop)
        return PagedPlan(self, spans, [sequence.pages for sequence in sequences])

    def _add(self, sequence: _Sequence) -> int:
        slot = next(self._slots)
        self._sequences[slot] = sequence
        return slot

    def _make_room(self, sequence: _Sequence, start: int, stop: int) -> None:
        """Pages of its own for positions start..stop-1, or KVFull and nothing changed."""
        if stop > self.shape.context:
            raise ValueError(f"{stop} tokens are asked for; the model's context is {self.shape.context}")
        pages = sequence.pages
        needed = -(-stop // PAGE)
        shared = [at for at in range(start // PAGE, min(needed, len(pages))) if self._holders[pages[at]] > 1]
        missing = max(0, needed - len(pages))
        if len(shared) + missing > len(self._free):
            raise self._full(len(shared) + missing)
        for at in shared:
            page = pages[at]
            pages[at] = self._copied(page)
            self._release(page)
        pages.extend(self._take() for _ in range(missing))

    def _full(self, pages: int) -> KVFull:
        return KVFull(
            f"{pages * PAGE} tokens more need {pages * self.page_bytes} bytes; {len(self._free) * self.page_bytes} of"
            f" the {self.bytes_limit} bytes for keys and values are free"
        )

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _copied(self, page: int) -> int:
        target = self._take()
        for layer in self.layers:
            layer[:, target] = layer[:, page]
        return target

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _lines(self, sequence: _Sequence, start: int, stop: int) -> Tensor:
        lines = [sequence.pages[at // PAGE] * PAGE + at % PAGE for at in range(start, stop)]
        return torch.tensor(lines, dtype=torch.int64, device=self.shape.device)


class PagedPlan:
    """StepPlan over pages: tokens are packed in the order they come in."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span], pages: Sequence[Sequence[int]]) -> None:
        self.order: Sequence[int] = range(len(spans))
        self._kv = kv
        self._spans = spans
        device = kv.shape.device
        lines = [
            held[at // PAGE] * PAGE + at % PAGE
            for span, held in zip(spans, pages, strict=True)
            for at in range(span.start, span.start + span.tokens)
        ]
        self._lines = torch.tensor(lines, device=device)
        lengths = [span.start + span.tokens for span in spans]
        used = [held[: -(-length // PAGE)] for held, length in zip(pages, lengths, strict=True)]
        widest = max(map(len, used))
        table = [[*row, *[0] * (widest - len(row))] for row in used]
        self._table = torch.tensor(table, dtype=torch.int32, device=device)
        self._lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._query_ends = _ends([span.tokens for span in spans], device)
        self._key_ends = _ends(lengths, device)
        self._most_queries = max(span.tokens for span in spans)
        self._most_keys = max(lengths)
        self._attend = self._by_kernel if kv.by_kernel else self._by_gathering

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        held = self._kv.layers[layer]
        keys, values = held.flatten(1, 2).unbind()
        keys.index_copy_(0, self._lines, key)
        values.index_copy_(0, self._lines, value)
        return self._attend(held, query, scale, window)

    def _by_kernel(self, held: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
        out = varlen_attn(
            query.contiguous(),
            held[0],
            held[1],
            self._query_ends,
            self._key_ends,
            self._most_queries,
            self._most_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # causal from the lower right
            enable_gqa=True,
            seqused_k=self._lengths,
            block_table=self._table,
        )
        assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
        return out

    def _by_gathering(self, held: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
        parts = []
        first = 0
        for span, pages in zip(self._spans, self._table, strict=True):
            length = span.start + span.tokens
            keys, values = held[:, pages].flatten(1, 2)[:, :length].transpose(1, 2).unsqueeze(1)
            place = torch.arange(span.start, length, device=held.device).unsqueeze(1)
            seen = torch.arange(length, device=held.device)
            mask = seen <= place if window is None else (seen <= place) & (seen > place - window)
            queries = query[first : first + span.tokens].transpose(0, 1).unsqueeze(0)
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
            first += span.tokens
        return torch.cat(parts)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """[len(counts) + 1]: 0, then where each part ends."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
