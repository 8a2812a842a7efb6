"""What a decoder layer does between its products and attention: RMS norms and rotary positions.

By our own kernels (`kernels.py`) where they are for this engine, else by torch.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from local_engine import kernels
from local_engine.kv import KVShape
from local_engine.simd import LANES


class Norm(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, width], normed."""
        ...


class Turn(Protocol):
    def __call__(self, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """heads [tokens, rotated heads, head_dim], which may be changed, normed and turned by their positions.

        rotary as `fused.fused_rotary` gives it.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    weights: Tensor
    """[query_heads + kv_heads, head_dim]."""
    epsilon: float


def best_norm(module: Any) -> Norm:
    """What computes what one of transformers' RMS norm modules does."""
    weight, epsilon = module.weight.detach(), module.variance_epsilon
    if weight.shape[0] % LANES == 0 and kernels.usable(weight.dtype, weight.device):
        return KernelNorm(weight, epsilon)
    return _TorchNorm(weight, epsilon)


def best_turn(shape: KVShape, norms: HeadNorms | None) -> Turn:
    if shape.head_dim % (2 * LANES) == 0 and kernels.usable(shape.dtype, shape.device):
        return KernelTurn(shape, norms)
    return _TorchTurn(shape, norms)


class _TorchNorm:
    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight.shape, self._weight, self._epsilon)


class KernelNorm:
    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight = weight
        self.epsilon = epsilon
        self._run = kernels.rms_norm(weight.shape[0], weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._run(x.data_ptr(), self.weight.data_ptr(), out.data_ptr(), x.shape[0], self.epsilon)
        return out


class _TorchTurn:
    def __init__(self, shape: KVShape, norms: HeadNorms | None) -> None:
        self._dim = shape.head_dim
        self._norms = norms

    def __call__(self, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self._norms:
            heads = rms_norm(heads, (self._dim,), None, self._norms.epsilon).mul_(self._norms.weights)
        cos, sin = rotary
        return torch.addcmul(heads * cos, heads.roll(self._dim // 2, -1), sin)


class KernelTurn:
    """In place."""

    def __init__(self, shape: KVShape, norms: HeadNorms | None) -> None:
        self._rotated = shape.query_heads + shape.kv_heads
        self.weights = None if norms is None else norms.weights
        self.epsilon = 0.0 if norms is None else norms.epsilon
        self._run = kernels.rotate(shape.head_dim, shape.dtype, normed=norms is not None)

    def __call__(self, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotary
        weights = None if self.weights is None else self.weights.data_ptr()
        places = heads.data_ptr(), weights, cos.data_ptr(), sin.data_ptr()
        self._run(*places, heads.shape[0], self._rotated, heads.stride(0), self.epsilon)
        return heads
