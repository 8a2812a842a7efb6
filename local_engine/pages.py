"""Memory in pages of 2 MiB where the system has them: what a step reads lies on fewer pages than the CPU remembers."""

import ctypes
import mmap
from typing import Any, Final

import torch
from torch import Tensor

_HUGE: Final = 2 << 20


def advise(tensor: Tensor) -> Tensor:
    """The same tensor, which nobody has touched yet; its pages will be large ones where that is possible."""
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if first < last:  # refused where the system has none: nothing is lost
            _madvise()(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


def on_large_pages(tensor: Tensor) -> Tensor:
    """A copy of a tensor, contiguous."""
    return advise(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)).copy_(tensor)


def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
