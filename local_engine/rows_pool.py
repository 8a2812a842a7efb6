"""Rows of one capacity, side by side: where the keys and values of `kv_rows.py` lie."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from local_engine.kv import KVShape
from local_engine.pages import zeros


class Pool:
    """Rows of one capacity: a tensor [2 (key, value), chunks, rows, kv_heads, chunk, head_dim] per layer."""

    def __init__(self, shape: KVShape, capacity: int, chunk: int | None) -> None:
        """`chunk` tokens of a row and head lie side by side, for our own kernels; None: all of them, for torch's."""
        self.capacity = capacity
        self.chunk = chunk or capacity
        self.in_chunks = chunk is not None
        self.rows = 0  # allocated; the first len(members) are in use
        self.members: list[Row] = []
        self._touched = 0
        """Rows after the first so many are zeros."""
        self._chunks = capacity // self.chunk
        self._size = (shape.kv_heads, self.chunk, shape.head_dim)
        self.layers = [torch.empty(2, self._chunks, 0, *self._size, dtype=shape.dtype) for _ in range(shape.layers)]
        self.addresses = array("q")
        """Of each layer's keys, then its values."""

    def resize(self, rows: int) -> None:
        """One layer after the other, so that no more than one layer is ever held twice: zeros take none until written.

        Raises torch.OutOfMemoryError, and nothing has changed.
        """
        kept = min(rows, len(self.members))
        filled = -(-max((row.length for row in self.members[:kept]), default=0) // self.chunk)
        # Zeros, never whatever the memory held: a masked key may be anything but NaN.
        shape, count = (2, self._chunks, rows, *self._size), len(self.layers)
        fresh = [zeros(shape, old.dtype, skew=at / count) for at, old in enumerate(self.layers)]
        for index, new in enumerate(fresh):
            new[:, :filled, :kept] = self.layers[index][:, :filled, :kept]
            self.layers[index] = new
        self.addresses = array("q", [part.data_ptr() for layer in self.layers for part in layer])
        self.rows = rows
        self._touched = kept

    def add(self) -> "Row":
        """Use one more of the rows."""
        row = Row(self, len(self.members), 0)
        if row.index < self._touched and not self.in_chunks:  # torch reads past a row's end, and masks what it read
            for layer in self.layers:
                layer[:, :, row.index].zero_()
        self._touched = max(self._touched, row.index + 1)
        self.members.append(row)
        return row

    def copy(self, source: "Row", target: int, length: int) -> None:
        """Copy the first `length` tokens of `source`, a row of any pool, to row `target` of this one."""
        tokens = min(length, self.chunk, source.pool.chunk)
        whole = -(-length // self.chunk)
        for mine, theirs in zip(self.layers, source.pool.layers, strict=True):
            mine[:, :whole, target, :, :tokens] = theirs[:, :whole, source.index, :, :tokens]

    def read(self, layer: Tensor, rows: slice, stop: int) -> Tensor:
        """The first tokens of some rows in one of `layers`: [2 (key, value), rows, kv_heads, stop, head_dim]."""
        parts = layer[:, : -(-stop // self.chunk), rows].permute(0, 2, 3, 1, 4, 5)
        return parts.flatten(3, 4)[:, :, :, :stop]

    def write(self, layer: Tensor, row: int, start: int, data: Tensor) -> None:
        """Put tokens [2 (key, value), kv_heads, tokens, head_dim] into a row from `start` on."""
        done = 0
        while done < data.shape[2]:
            index, within = divmod(start + done, self.chunk)
            whole = (data.shape[2] - done) // self.chunk if within == 0 else 0
            if whole:
                parts = data[:, :, done : done + whole * self.chunk]
                parts = parts.reshape(2, parts.shape[1], whole, self.chunk, parts.shape[3])
                layer[:, index : index + whole, row] = parts.transpose(1, 2)
                done += whole * self.chunk
            else:
                count = min(self.chunk - within, data.shape[2] - done)
                layer[:, index, row, :, within : within + count] = data[:, :, done : done + count]
                done += count

    def remove(self, row: "Row") -> None:
        """The last row moves into the hole."""
        last = self.members.pop()
        if last is not row:
            # For torch with its zeros, over what the hole held: see `add`.
            self.copy(last, row.index, last.length if self.in_chunks else self.capacity)
            last.index = row.index
            self.members[last.index] = last


@dataclass(slots=True, eq=False)
class Row:
    pool: Pool
    index: int
    length: int
    asked: int = 0
    """Tokens that it was asked to have room for."""
