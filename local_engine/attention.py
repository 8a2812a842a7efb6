"""The attention function that transformers' decoder layers call while a Runner drives them.

Registered with transformers' AttentionInterface under NAME. transformers builds no masks for a name it does not
know, so outside a step a plain forward would see later tokens too: the function raises there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface

from local_engine.kv import StepPlan

NAME: Final = "leadline"

_step: ContextVar[StepPlan | None] = ContextVar("leadline_step", default=None)


@contextmanager
def step(plan: StepPlan) -> Iterator[None]:
    """Within this context, decoder layers attend as `plan` says."""
    token = _step.set(plan)
    try:
        yield
    finally:
        _step.reset(token)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, query_heads, tokens, head_dim], key and value with kv_heads; gives [1, tokens, query_heads, head_dim].

    Raises RuntimeError outside a step.
    """
    plan = _step.get()
    if plan is None:
        raise RuntimeError(
            "this network belongs to a Runner, and no step is running: call Runner.run, or give the network its own"
            ' attention back with network.set_attn_implementation("sdpa")'
        )
    layer: Any = module.layer_idx
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = plan.attend(layer, query, key, value, kwargs["scaling"], kwargs.get("sliding_window"))
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attend)
