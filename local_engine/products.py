"""Products with weights, the part of a forward pass that takes the time: ours, oneDNN's for CPU, and torch's own.

A decode step has few rows, so its products are bound by reading the weights. Our own kernels (`kernels.py`), and oneDNN
with weights in its own blocked layout, come close to that bound, and add activations and sums on the way out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from local_engine import kernels
from local_engine.shared_product import SharedProduct
from local_engine.simd import LANES

SMALLEST_REPACKED: Final = {torch.float32: 1 << 17, torch.bfloat16: 1 << 14}
"""Weights of a product. With fewer, starting oneDNN (12 µs) costs more than it saves at one row; torch's own bfloat16
products start it anyway. Other types are not repacked."""
_SMALLEST_SHARED: Final = 1 << 19
"""As above, for float32 weights that stay as they are."""
_EXPECTED_ROWS: Final = 8
_COPIED_SHARE: Final = 0.1
"""Most of a model's weights that a tied head may be held twice with; repacked, its product takes half the time."""
_COPIED_BYTES: Final = 1 << 20
"""A head of fewer may be, whatever its share."""
_COPIED_NARROW: Final = 0.5
"""As _COPIED_SHARE, where it and all others are held in half their bytes: no more is held than if none were."""


class Product(Protocol):
    """x @ weight.T + bias for x [rows, inputs], alone or with what follows it; gives a tensor of its own."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def plus(self, x: Tensor, term: Tensor) -> Tensor: ...


class GatedProduct(Protocol):
    """silu(x @ gate.T) * (x @ up.T) for x [rows, inputs]."""

    def __call__(self, x: Tensor) -> Tensor: ...


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


class KernelProduct:
    """Our own kernel's product; `pack` copies the weights, which are `held` as `kernels.held_as` says."""

    def __init__(self, weight: Tensor, bias: Tensor | None, held: torch.dtype) -> None:
        self.types = kernels.Types(weight.dtype, held)
        self.packed = kernels.pack(weight, held)
        self.outputs = weight.shape[0]
        self.bias = bias
        self._plain = SharedProduct(self.types, "plain" if bias is None else "bias")
        self._sum = SharedProduct(self.types, "sum")

    @staticmethod
    def fits(weight: Tensor) -> bool:
        outputs, inputs = weight.shape
        return outputs % kernels.PANEL == 0 and inputs % 2 == 0 and kernels.usable(weight.dtype, weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(self._plain, x, self.bias)

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        if self.bias is not None:
            return self(x).add_(term)
        return self._run(self._sum, x, term.contiguous())

    def _run(self, product: SharedProduct, x: Tensor, other: Tensor | None) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0], self.outputs)
        product(x, self.packed, other, out, self.outputs)
        return out


class KernelGated:
    """Our own kernel for both products of a gate; their columns take turns in its weights."""

    def __init__(self, gate: Tensor, up: Tensor, held: torch.dtype) -> None:
        outputs, inputs = gate.shape
        self.types = kernels.Types(gate.dtype, held)
        both = torch.stack((gate.view(-1, LANES, inputs), up.view(-1, LANES, inputs)), 1).flatten(0, 2)
        self.packed = kernels.pack(both, held)
        self.outputs = 2 * outputs
        self._gated = SharedProduct(self.types, "gated")
        self._plain = SharedProduct(self.types, "plain")

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(self._gated, x, self.outputs // 2)

    def part(self, which: int, x: Tensor) -> Tensor:
        """The gate's product alone, or, for 1, the other's."""
        out = self._run(self._plain, x, self.outputs)
        return out.view(x.shape[0], -1, 2, LANES)[:, :, which].flatten(1)

    def _run(self, product: SharedProduct, x: Tensor, columns: int) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0], columns)
        product(x, self.packed, None, out, self.outputs)
        return out


class GatedPair:
    """Two products, the one's activation and the multiplication on oneDNN's way out."""

    def __init__(self, gate: "PlainProduct | OneDNNProduct", up: "PlainProduct | OneDNNProduct") -> None:
        self._gate = gate
        self._up = up

    def __call__(self, x: Tensor) -> Tensor:
        return self._up.times(x, self._gate.silu(x))


class Stand(nn.Module):
    """Stands in a network for a linear module whose weights were repacked; `product` takes x [rows, inputs]."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        out = self._product(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], out.shape[-1])


def best_product(weight: Tensor, bias: Tensor | None, held: torch.dtype) -> Product:
    """The product to run weights with that nothing else reads; our own has them `held` as `kernels.held_as` says."""
    return KernelProduct(weight, bias, held) if KernelProduct.fits(weight) else _torch_product(weight, bias)


def _torch_product(weight: Tensor, bias: Tensor | None) -> PlainProduct | OneDNNProduct:
    if weight.device.type == "cpu" and weight.numel() >= SMALLEST_REPACKED.get(weight.dtype, weight.numel() + 1):
        return OneDNNProduct(weight, bias, repack=True)
    return PlainProduct(weight, bias)


class Linears:
    """Linear modules of a network that read the same input, as one product; `held` as of `best_product`."""

    def __init__(self, held: torch.dtype, parent: Any, *names: str) -> None:
        self._parent = parent
        self._names = names
        modules = self._modules()
        weights = [part.weight.detach() for part in modules]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if modules[0].bias is None else torch.cat([part.bias.detach() for part in modules])
        self.product = best_product(self._weight, bias, held)

    def take_over(self) -> None:
        """Let the network's modules use the product's weights, so that they are held once."""
        begin = 0
        for name, module in zip(self._names, self._modules(), strict=True):
            end = begin + module.out_features
            if isinstance(self.product, PlainProduct):
                module.weight.data = self._weight[begin:end]
            else:
                setattr(self._parent, name, Stand(partial(_columns, self.product, begin, end)))
            begin = end

    def _modules(self) -> Sequence[nn.Linear]:
        return [getattr(self._parent, name) for name in self._names]


def _columns(product: Product, begin: int, end: int, x: Tensor) -> Tensor:
    return product(x)[:, begin:end]


class GatedLinears:
    """The gate and the other module of a gated feed-forward block; `held` as of `best_product`."""

    def __init__(self, held: torch.dtype, parent: Any, gate: str, up: str) -> None:
        self._parent = parent
        self._names = (gate, up)
        modules: list[nn.Linear] = [getattr(parent, name) for name in self._names]
        weights = [module.weight.detach() for module in modules]
        biases = [None if module.bias is None else module.bias.detach() for module in modules]
        self._kernel: KernelGated | None = None
        self._pair: list[PlainProduct | OneDNNProduct] = []
        self.product: GatedProduct
        if KernelProduct.fits(weights[0]) and biases == [None, None]:
            self.product = self._kernel = KernelGated(weights[0], weights[1], held)
        else:
            self._pair = [_torch_product(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            self.product = GatedPair(*self._pair)

    def take_over(self) -> None:
        """As `Linears.take_over`."""
        for which, name in enumerate(self._names):
            if self._kernel is not None:
                setattr(self._parent, name, Stand(partial(self._kernel.part, which)))
            elif isinstance(self._pair[which], OneDNNProduct):
                setattr(self._parent, name, Stand(self._pair[which]))


def shared_product(weight: Tensor, share: float) -> Product:
    """The product for weights that something else reads too, as a tied embedding; `share` of the model's they are.

    They are copied where the copy is little; else they are used where they are.
    """
    held = kernels.held_as([weight])
    most = _COPIED_SHARE if held == weight.dtype else _COPIED_NARROW
    if share <= most or weight.nbytes <= _COPIED_BYTES:
        return best_product(weight, None, held)
    gains = weight.dtype == torch.float32 and weight.numel() >= _SMALLEST_SHARED
    return (
        OneDNNProduct(weight, None, repack=False)
        if weight.device.type == "cpu" and gains
        else PlainProduct(weight, None)
    )
