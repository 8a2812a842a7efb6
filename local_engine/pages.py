"""Memory in pages of 2 MiB where the system has them: what a step reads lies on fewer pages than the CPU remembers.

Fetching ahead needs them most: what it asks for on a page that the CPU has forgotten comes late, and what is asked for
meanwhile waits.
"""

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Final

import torch
from torch import Tensor

_HUGE: Final = 2 << 20
_ARENA: Final = 16 * _HUGE
"""Weights share it: most are smaller than a page, or end within one."""
_LINE: Final = 64


def zeros(shape: Sequence[int], dtype: torch.dtype, skew: float = 0.0) -> Tensor:
    """On the CPU.

    `skew` is the share of a large page after which it begins: the system finds a page when it is first written to, and
    tensors that are written alike and begin alike would all need their next one in the same step.
    """
    size = prod(shape) * dtype.itemsize
    begin = int(skew * _HUGE) // _LINE * _LINE if size >= _HUGE else 0
    return whole_pages(begin + size)[begin:].view(dtype).view(*shape)


def on_large_pages(tensor: Tensor) -> Tensor:
    """A copy of a tensor, contiguous."""
    if tensor.device.type != "cpu":
        return tensor.contiguous().clone()
    place = _weights.take(tensor.numel() * tensor.itemsize)
    return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _Arenas:
    """Room for tensors one behind the other; an arena is freed with the last of its tensors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Bytes that nobody else has."""
        with self._lock:
            if self._used + size > self._arena.numel():
                self._arena = whole_pages(max(_ARENA, -(-size // _HUGE) * _HUGE))
                self._used = 0
            begin = self._used
            self._used += -(-size // _LINE) * _LINE
            return self._arena[begin : begin + size]


_weights: Final = _Arenas()


def whole_pages(size: int) -> Tensor:
    """Bytes that are zero, from the beginning of a large page on if they fill one.

    Straight from the system: what `malloc` hands out again was cut into small pages by those who had it before. Raises
    torch.OutOfMemoryError.
    """
    try:
        if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(size, dtype=torch.uint8)
        room = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, RuntimeError) as error:
        raise torch.OutOfMemoryError(f"the system has no {size} bytes: {error}") from error
    with suppress(OSError):  # a system that was built without: nothing is lost
        room.madvise(mmap.MADV_HUGEPAGE)
    place = torch.frombuffer(room, dtype=torch.uint8)
    begin = -place.data_ptr() % _HUGE
    return place[begin : begin + size]
