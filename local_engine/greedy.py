"""One sequence's most probable tokens, one after the other, each in one call of our own kernels (`whole.py`).

For text that nobody waits for token by token, such as a draft's: planning, packing, sampling and telling take several
times as long as a small model computes for a token.
"""

import math
from array import array
from enum import IntEnum, auto
from functools import cache
from typing import Final

import torch
from torch import Tensor

from local_engine import kernels
from local_engine.kv import KVCache
from local_engine.kv_rows import Reading
from local_engine.products import KernelProduct
from local_engine.sampler import Choice
from local_engine.simd import LANES, PTR, Kernel, Writer
from local_engine.whole import WholeForward, address

_NOWHERE: Final = 1 << 62


class _Word(IntEnum):
    """What the kernel is told: addresses, and how many layers there are."""

    EMBEDDING = 0
    COS_TABLE = auto()
    SIN_TABLE = auto()
    TOKEN = auto()
    POSITION = auto()
    HIDDEN = auto()
    COS = auto()
    SIN = auto()
    STEP = auto()
    LAYERS = auto()
    LAST = auto()
    NORM = auto()
    HEAD = auto()
    LOGITS = auto()
    FOUND = auto()


@cache
def _advance(width: int, dim: int, vocabulary: int, dtype: torch.dtype, epsilon: float, decode: Kernel) -> Kernel:
    """(words): from the token at TOKEN to the most probable one after it, which takes its place.

    FOUND gets two float32: the sum of exp(logit - greatest), and of exp(logit - greatest) * (logit - greatest).
    """
    row, angles = kernels.take(width, dtype), kernels.take(dim, dtype)
    norm, product = kernels.rms_norm(width, dtype), kernels.product(dtype, "plain")
    w = Writer("advance", [PTR])
    (words,) = w.arguments
    told = {word: w.load_int(words, w.whole(word)) for word in _Word}
    hidden, logits, token, position = (told[word] for word in (_Word.HIDDEN, _Word.LOGITS, _Word.TOKEN, _Word.POSITION))
    w.call(row, told[_Word.EMBEDDING], token, hidden, 1)
    w.call(angles, told[_Word.COS_TABLE], position, told[_Word.COS], 1)
    w.call(angles, told[_Word.SIN_TABLE], position, told[_Word.SIN], 1)
    w.call(decode, told[_Word.STEP], told[_Word.LAYERS], 0, told[_Word.LAST])
    w.call(norm, hidden, told[_Word.NORM], hidden, 1, epsilon)
    w.call(product, hidden, told[_Word.HEAD], 0, logits, 1, width, vocabulary, told[_Word.HEAD])
    rows = w.pointer(logits)
    greatest = w.variable(w.number(-math.inf))
    with w.loop(w.whole(0), w.whole(vocabulary), LANES) as at:
        greatest.value = w.largest(greatest.value, w.load(rows, at, dtype))
    top = w.splat(w.top(greatest.value))
    total, weighed = w.variable(w.number(0.0)), w.variable(w.number(0.0))
    which = w.variable(w.whole(_NOWHERE))
    with w.loop(w.whole(0), w.whole(vocabulary), LANES) as at:
        below = w.less(w.load(rows, at, dtype), top)
        share = w.exp(below)
        total.value = w.plus(total.value, share)
        weighed.value = w.fma(share, below, weighed.value)
        here = w.add(at, w.first_zero(below, _NOWHERE >> 1))
        which.value = w.either(here, "<", which.value, here, which.value)
    found = w.pointer(told[_Word.FOUND])
    w.store_scalar(w.sum(total.value), found, w.whole(0))
    w.store_scalar(w.sum(weighed.value), found, w.whole(1))
    w.store_int(which.value, w.pointer(token), w.whole(0))
    place = w.pointer(position)
    w.store_int(w.add(w.load_int(place, w.whole(0)), 1), place, w.whole(0))
    return w.compiled()


class Greedy:
    """Writes on from the end of one slot. Nothing else may run over this model until `commit`."""

    def __init__(
        self,
        whole: WholeForward,
        head: KernelProduct,
        kv: KVCache,
        slot: int,
        reading: Reading,
        angles: tuple[Tensor, Tensor],
    ) -> None:
        """`reading`: of a span of one token after those in `slot`; `angles` as `WholeForward.run` takes them."""
        self._kv, self._slot, self._reading = kv, slot, reading
        self._token = array("q", [0])
        self._found = array("f", [0.0, 0.0])
        self._one = one = whole.one_token(reading)
        self._vocabulary = head.outputs
        self._logits = torch.empty(head.outputs, dtype=one.dtype)
        told = {
            _Word.EMBEDDING: one.embedding,
            _Word.COS_TABLE: angles[0].data_ptr(),
            _Word.SIN_TABLE: angles[1].data_ptr(),
            _Word.TOKEN: address(self._token),
            _Word.POSITION: address(reading.positions),
            _Word.HIDDEN: one.hidden,
            _Word.COS: one.cos,
            _Word.SIN: one.sin,
            _Word.STEP: address(one.step),
            _Word.LAYERS: one.layers,
            _Word.LAST: one.layer_count,
            _Word.NORM: one.norm,
            _Word.HEAD: head.packed.data_ptr(),
            _Word.LOGITS: self._logits.data_ptr(),
            _Word.FOUND: address(self._found),
        }
        self._words = array("q", [told[word] for word in _Word])
        self._kernel = _advance(one.width, one.head_dim, head.outputs, one.dtype, one.epsilon, one.decode)

    def after(self, token: int) -> Choice:
        """Read one token: the most probable one after it.

        Raises IndexError for a token that the model does not have, ArithmeticError where its logits are no numbers.
        """
        if token >= self._vocabulary:
            raise IndexError(f"token {token}: the model has tokens 0 to {self._vocabulary - 1}; its tokenizer has more")
        self._token[0] = token
        self._kernel(address(self._words))
        total, weighed = self._found
        if self._token[0] >= self._vocabulary:
            raise ArithmeticError(f"the logits after token {token} are no numbers: no token is the most probable")
        log_total = math.log(total)
        return Choice(self._token[0], -log_total, [], log_total - weighed / total)

    def commit(self) -> None:
        """Let the slot hold what was read."""
        self._kv.commit(self._slot, self._reading.positions[0])
