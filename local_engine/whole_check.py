"""Steps in one native call (`whole.py`, `greedy.py`) against what they stand for, on a few tokens at load.

That is the fused layers one by one, which `fused.py` has checked, between the network's own embedding, norm and head.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from local_engine.fused import CHECK_TOKENS, TOLERANCES, FusedLayer, Rotary, fused_rotary
from local_engine.greedy import Greedy
from local_engine.kv import Span
from local_engine.kv_rows import SMALLEST_ROW, RowsKV
from local_engine.products import KernelProduct
from local_engine.rows_plan import Reading
from local_engine.simd import Kernel
from local_engine.tapped import NOTHING
from local_engine.whole import PackedRows, WholeForward

logger = logging.getLogger(__name__)

_LAST: Final = CHECK_TOKENS - 1
_STEPS: Final = (0, _LAST), (_LAST, CHECK_TOKENS)
"""Where they begin and end: a prompt, and one token after it."""


@torch.no_grad()
def gives_the_same(
    network: Any,
    layers: Sequence[FusedLayer],
    rotary: Rotary,
    whole: WholeForward,
    greedy: tuple[Kernel, KernelProduct] | None,
    angles: tuple[Tensor, Tensor],
) -> bool:
    """Whether steps by `whole`, and by the `greedy` kernel and its head, give the same; if not, a warning says why.

    `rotary` is transformers' cos and sin [CHECK_TOKENS, head_dim], `angles` the same as `WholeForward.run` takes them.
    Keys and values are the check's own, for no longer than that: who asks may have a full budget.
    """
    shape = replace(layers[0].shape, context=CHECK_TOKENS)
    kv = RowsKV(shape, 3 * SMALLEST_ROW * shape.token_bytes)
    tokens = [token % network.config.vocab_size for token in range(CHECK_TOKENS)]
    expected = _one_by_one(network, layers, rotary, kv, tokens)
    greatest = float(expected.abs().max())
    slot = kv.open(CHECK_TOKENS)
    try:
        for start, stop in _STEPS:
            packed = PackedRows(tokens[start:stop], range(stop - start), ())
            given = whole.run(packed, _reading(kv, slot, start, stop), angles, (0, len(layers)), NOTHING, None)[0]
            apart = float((given - expected[start:stop]).abs().max())
            _bound("logits differ", apart, TOLERANCES[shape.dtype] * greatest)
            kv.commit(slot, stop)
        if greedy is not None:
            kernel, head = greedy
            fork = kv.fork(slot, _LAST)
            reading = _reading(kv, fork, _LAST, CHECK_TOKENS)
            choice = Greedy(kernel, whole, head, kv, fork, reading, angles, len(layers)).after(tokens[_LAST])
            logprob = float(given[0].float().log_softmax(-1)[choice.token])  # from the same logits, to the bit
            apart = abs(choice.logprob - logprob)
            _bound("the greedy token's log-probability differs", apart, TOLERANCES[torch.float32] * greatest)
    except (ArithmeticError, IndexError, RuntimeError) as error:
        logger.warning("steps in one native call are not used: %s", error)
        return False
    return True


def _one_by_one(
    network: Any, layers: Sequence[FusedLayer], rotary: Rotary, kv: RowsKV, tokens: Sequence[int]
) -> Tensor:
    """float32 logits [CHECK_TOKENS, vocabulary]."""
    slot = kv.open(CHECK_TOKENS)
    logits = []
    for start, stop in _STEPS:
        plan = kv.plan([Span(slot, start, stop - start)])
        hidden = network.model.embed_tokens(torch.tensor(tokens[start:stop]))
        turned = fused_rotary(rotary[0][start:stop], rotary[1][start:stop])
        for layer in layers:
            hidden = layer.forward(hidden, turned, plan)
        logits.append(network.lm_head(network.model.norm(hidden)).float())
        kv.commit(slot, stop)
    return torch.cat(logits)


def _reading(kv: RowsKV, slot: int, start: int, stop: int) -> Reading:
    reading = kv.plan([Span(slot, start, stop - start)]).reading
    assert reading is not None, "rows of few tokens, held for our own kernels"
    return reading


def _bound(what: str, error: float, most: float) -> None:
    if not error <= most:
        raise RuntimeError(f"{what} by {error:.1e}, which is more than {most:.1e}")
