"""A lean forward pass through the decoder layers that the engine runs: the same numbers with a third of the operations.

Query, key and value are one product; the activation and both residual sums happen inside the products
(`products.py`). Weights are held once: the network's own modules use the fused ones and go on working. Only the table
of a head that embeds, too, may be held twice.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from local_engine import attention, kernels
from local_engine.kv import KVCache, KVShape, Span, StepPlan
from local_engine.norms import HeadNorms, Norm, Turn, best_norm, best_turn
from local_engine.products import GatedLinears, GatedProduct, Linears, Product, shared_product

logger = logging.getLogger(__name__)

CHECK_TOKENS: Final = 9
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Most that a layer may differ from transformers' own, as a share of its greatest value."""

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class FusedLayer:
    """One decoder layer of Llama, Mistral, Qwen2 or Qwen3: `forward` computes what the module computes."""

    index: int
    shape: KVShape
    scale: float
    window: int | None
    input_norm: Norm
    mlp_norm: Norm
    turn: Turn
    """Norms of query and key heads, where the model has them, and rotary positions."""
    qkv: Product
    output: Product
    gated: GatedProduct
    down: Product

    def forward(self, hidden: Tensor, rotary: Rotary, plan: StepPlan) -> Tensor:
        """hidden and result [tokens, width]; rotary as `fused_rotary` gives it."""
        shape = self.shape
        rotated = shape.query_heads + shape.kv_heads
        heads = self.qkv(self.input_norm(hidden)).view(-1, rotated + shape.kv_heads, shape.head_dim)
        turned = self.turn(heads[:, :rotated], rotary)
        query, key = turned[:, : shape.query_heads], turned[:, shape.query_heads :]
        seen = plan.attend(self.index, query, key, heads[:, rotated:], self.scale, self.window)
        hidden = self.output.plus(seen.reshape(hidden.shape[0], -1), hidden)
        return self.down.plus(self.gated(self.mlp_norm(hidden)), hidden)


def fused_rotary(cos: Tensor, sin: Tensor) -> Rotary:
    """transformers' tables [tokens, head_dim] as [tokens, 1, head_dim], with the rotated half's sign in the sine."""
    half = sin.shape[-1] // 2
    return cos.unsqueeze(1), torch.cat((-sin[:, :half], sin[:, half:]), -1).unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """What computes a network's numbers in its place, but for its norm."""

    layers: Sequence[FusedLayer]
    head: Product


def fuse(network: nn.Module, kv: KVCache, rotary: Rotary) -> Fused | None:
    """None, and a warning says why, if a layer or the head gives other numbers than the network's.

    The network attends by this package's function; `kv` has room for CHECK_TOKENS; `rotary` is transformers' cos and
    sin [tokens, head_dim] for as many. Each layer is checked before its weights are taken over, so no more than one
    layer is ever held twice. Asked again for the same network, gives the same.
    """
    if network not in _fused:
        _fused[network] = _fuse(network, kv, rotary)
    return _fused[network]


_fused: WeakKeyDictionary[nn.Module, Fused | None] = WeakKeyDictionary()


@torch.no_grad()
def _fuse(network: Any, kv: KVCache, rotary: Rotary) -> Fused | None:
    slot, body = kv.open(CHECK_TOKENS), network.model
    hidden = body.embed_tokens(torch.arange(CHECK_TOKENS, device=kv.shape.device) % body.embed_tokens.num_embeddings)
    layers = []
    held = kernels.held_as([part.weight for part in body.layers.modules() if isinstance(part, nn.Linear)])
    try:
        head, take_head = _build_head(network)
        normed = body.norm(hidden)
        _check("the head", head(normed), network.lm_head(normed))
        for index, module in enumerate(body.layers):
            layer, take_over = _build(module, index, kv.shape, held)
            expected = _checked(kv, slot, hidden, rotary, partial(_by_module, module))
            got = _checked(kv, slot, hidden, rotary, partial(_by_fused, layer))
            _check(f"layer {index}", got, expected)
            take_over()
            layers.append(layer)
            hidden = expected
        take_head()
    except (AttributeError, RuntimeError) as error:
        logger.warning("the fused forward pass is not used: %s", error)
        return None
    finally:
        kv.close(slot)
    return Fused(layers, head)


def _check(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCES[expected.dtype]:
        raise RuntimeError(f"{what} differs from transformers' by {error:.1e} of its greatest value")


def _checked(kv: KVCache, slot: int, hidden: Tensor, rotary: Rotary, forward: Callable[..., Tensor]) -> Tensor:
    """One layer over `hidden`, the last token in a step of its own."""
    kv.truncate(slot, 0)
    parts = []
    for start, stop in ((0, CHECK_TOKENS - 1), (CHECK_TOKENS - 1, CHECK_TOKENS)):
        plan = kv.plan([Span(slot, start, stop - start)])
        parts.append(forward(hidden[start:stop], (rotary[0][start:stop], rotary[1][start:stop]), plan))
        kv.commit(slot, stop)
    return torch.cat(parts)


def _by_module(module: nn.Module, hidden: Tensor, rotary: Rotary, plan: StepPlan) -> Tensor:
    cos, sin = rotary
    with attention.step(plan):
        out: Tensor = module(hidden.unsqueeze(0), position_embeddings=(cos.unsqueeze(0), sin.unsqueeze(0)))
    return out[0]


def _by_fused(layer: FusedLayer, hidden: Tensor, rotary: Rotary, plan: StepPlan) -> Tensor:
    return layer.forward(hidden, fused_rotary(*rotary), plan)


def _build_head(network: Any) -> tuple[Product, Callable[[], None]]:
    """As `_build`."""
    weight = network.lm_head.weight.detach()
    if network.lm_head.weight is network.model.embed_tokens.weight:
        return shared_product(weight, weight.numel() / sum(one.numel() for one in network.parameters())), _nothing
    own = Linears(kernels.held_as([weight]), network, "lm_head")
    return own.product, own.take_over


def _nothing() -> None:
    """The embedding's table stays."""


def _build(module: Any, index: int, shape: KVShape, held: torch.dtype) -> tuple[FusedLayer, Callable[[], None]]:
    """The fused layer, and what makes the module use its weights."""
    attend, mlp = module.self_attn, module.mlp
    linears = [
        Linears(held, attend, "q_proj", "k_proj", "v_proj"),
        Linears(held, attend, "o_proj"),
        Linears(held, mlp, "down_proj"),
    ]
    qkv, output, down = (part.product for part in linears)
    gated = GatedLinears(held, mlp, "gate_proj", "up_proj")
    head_norms = None
    if hasattr(attend, "q_norm"):
        weights = [*[attend.q_norm.weight] * shape.query_heads, *[attend.k_norm.weight] * shape.kv_heads]
        head_norms = HeadNorms(torch.stack(weights).detach(), attend.q_norm.variance_epsilon)
    layer = FusedLayer(
        index=index,
        shape=shape,
        scale=attend.scaling,
        window=getattr(attend, "sliding_window", getattr(attend.config, "sliding_window", None)),
        input_norm=best_norm(module.input_layernorm),
        mlp_norm=best_norm(module.post_attention_layernorm),
        turn=best_turn(shape, head_norms),
        qkv=qkv,
        output=output,
        gated=gated.product,
        down=down,
    )

    def take_over() -> None:
        for part in linears:
            part.take_over()
        gated.take_over()

    return layer, take_over
