"""Products with weights, the part of a forward pass that takes the time: torch's own, and oneDNN's for CPU.

A decode step has few rows, so its products are bound by reading the weights. oneDNN with weights in its own blocked
layout comes close to that bound, and adds activations and sums on the way out.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

SMALLEST_REPACKED: Final = {torch.float32: 1 << 17, torch.bfloat16: 1 << 14}
"""Weights of a product. With fewer, starting oneDNN (12 µs) costs more than it saves at one row; torch's own bfloat16
products start it anyway. Other types are not repacked."""
_SMALLEST_SHARED: Final = 1 << 19
"""As above, for float32 weights that stay as they are."""
_EXPECTED_ROWS: Final = 8


class Product(Protocol):
    """x @ weight.T + bias for x [rows, inputs], alone or with what follows it; gives a tensor of its own."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def silu(self, x: Tensor) -> Tensor: ...
    def times(self, x: Tensor, factor: Tensor) -> Tensor: ...
    def plus(self, x: Tensor, term: Tensor) -> Tensor: ...


class PlainProduct:
    """torch's own product; the weights stay as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        return silu(self(x), inplace=True)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self(x).mul_(factor)

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        return self(x).add_(term)


class OneDNNProduct:
    """oneDNN's product, by the operators that torch's compiler emits for CPU; `repack` copies the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, repack: bool) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS) if repack else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    def silu(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "swish", [], "")
        return out

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._weight, self._bias, "mul")
        return out

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, term, self._weight, self._bias, "add")
        return out


class Columns(nn.Module):
    """Stands in a network for a linear module whose weights became columns `begin` to `end` of a repacked product."""

    def __init__(self, product: Product, begin: int, end: int) -> None:
        super().__init__()
        self._product = product
        self._begin, self._end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        out = self._product(x.reshape(-1, x.shape[-1]))[:, self._begin : self._end]
        return out.reshape(*x.shape[:-1], -1)


def best_product(weight: Tensor, bias: Tensor | None) -> Product:
    """The product to run weights with that nothing else reads."""
    if weight.device.type == "cpu" and weight.numel() >= SMALLEST_REPACKED.get(weight.dtype, weight.numel() + 1):
        return OneDNNProduct(weight, bias, repack=True)
    return PlainProduct(weight, bias)


class Linears:
    """Linear modules of a network that read the same input, as one product."""

    def __init__(self, parent: Any, *names: str) -> None:
        self._parent = parent
        self._names = names
        modules = self._modules()
        weights = [part.weight.detach() for part in modules]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if modules[0].bias is None else torch.cat([part.bias.detach() for part in modules])
        self.product = best_product(self._weight, bias)

    def take_over(self) -> None:
        """Let the network's modules use the product's weights, so that they are held once."""
        begin = 0
        for name, module in zip(self._names, self._modules(), strict=True):
            end = begin + module.out_features
            if isinstance(self.product, PlainProduct):
                module.weight.data = self._weight[begin:end]
            else:
                setattr(self._parent, name, Columns(self.product, begin, end))
            begin = end

    def _modules(self) -> Sequence[nn.Linear]:
        return [getattr(self._parent, name) for name in self._names]


def shared_product(weight: Tensor) -> Product:
    """The product for weights that something else reads too, as a tied embedding: where they are, without a copy."""
    gains = weight.dtype == torch.float32 and weight.numel() >= _SMALLEST_SHARED
    return (
        OneDNNProduct(weight, None, repack=False)
        if weight.device.type == "cpu" and gains
        else PlainProduct(weight, None)
    )
