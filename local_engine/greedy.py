"""One sequence's most probable tokens, one after the other, in calls of our own kernels (`whole.py`).

For text that nobody waits for token by token, such as a draft's: planning, packing, sampling and telling take several
times as long as a small model computes for a token.
"""

import math
from array import array
from collections.abc import Sequence
from enum import IntEnum, auto
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from local_engine.kv import KVCache
from local_engine.products import KernelProduct
from local_engine.rows_plan import Reading, Shared
from local_engine.sampler import Choice
from local_engine.simd import LANES, PTR, Kernel, Writer, address
from local_engine.step import StepWord
from local_engine.whole import WholeForward

_NOWHERE: Final = 1 << 62


class _Word(IntEnum):
    """What the kernel is told: addresses, and how many tokens there are."""

    STEP = 0
    TOKENS = auto()
    GIVEN = auto()
    MOST = auto()
    FOUND = auto()
    FLOOR = auto()
    WRITTEN = auto()


@cache
def advance(run: Kernel, vocabulary: int, dtype: torch.dtype) -> Kernel:
    """(words): reads GIVEN of the TOKENS, and writes up to MOST more after them, each the most probable one.

    It ends early where the written ones together have a probability of FLOOR (one float32) or less; the last one is not
    read. WRITTEN gets how many there are; FOUND two float32 for each: the sum of exp(logit - greatest), and of
    exp(logit - greatest) * (logit - greatest). `run` is `WholeForward.kernel`, its logits of `dtype`.
    """
    w = Writer("advance", [PTR])
    (words,) = w.arguments
    told = {word: w.load_int(words, w.whole(word)) for word in _Word}
    step, found = w.pointer(told[_Word.STEP]), w.pointer(told[_Word.FOUND])
    tokens, written = w.pointer(told[_Word.TOKENS]), w.pointer(told[_Word.WRITTEN])
    rows, place = (w.pointer(w.load_int(step, w.whole(word))) for word in (StepWord.LOGITS, StepWord.POSITIONS))
    floor = w.splat_from(w.pointer(told[_Word.FLOOR]), w.whole(0))
    chance, going = w.variable(w.number(1.0)), w.variable(w.whole(1))
    last = w.minus(told[_Word.GIVEN], w.whole(1))
    w.store_int(w.whole(0), written, w.whole(0))
    with w.loop(w.whole(0), w.add(last, told[_Word.MOST])) as at, w.where(going.value, "!=", w.whole(0)):
        w.store_int(w.add(told[_Word.TOKENS], w.times(at, 8)), step, w.whole(StepWord.TOKENS))
        w.store_int(w.either(at, ">=", last, w.whole(1), w.whole(0)), step, w.whole(StepWord.LOGIT_COUNT))
        w.call(run, told[_Word.STEP])
        w.store_int(w.add(w.load_int(place, w.whole(0)), 1), place, w.whole(0))
        with w.where(at, ">=", last):
            which, total, weighed = _favourite(w, rows, vocabulary, dtype)
            index = w.minus(at, last)
            w.store_scalar(total, found, w.times(index, 2))
            w.store_scalar(weighed, found, w.add(w.times(index, 2), 1))
            w.store_int(which, tokens, w.add(at, 1))
            w.store_int(w.add(index, 1), written, w.whole(0))
            chance.value = w.over(chance.value, w.splat(total))
            above = w.first_zero(w.largest(w.less(chance.value, floor), w.number(0.0)), 1)  # 0: it is not above
            going.value = w.either(which, "<", w.whole(vocabulary), above, w.whole(0))
    return w.compiled()


def _favourite(w: Writer, rows: Any, vocabulary: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(the most probable token, the sums that FOUND gets of it) of one row of logits."""
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
    return which.value, w.sum(total.value), w.sum(weighed.value)


class Greedy:
    """Writes on from the end of one slot. Nothing else may run over this model until `commit`."""

    def __init__(
        self,
        kernel: Kernel,
        whole: WholeForward,
        head: KernelProduct,
        kv: KVCache,
        slot: int,
        reading: Reading,
        angles: tuple[Tensor, Tensor],
        layers: int,
    ) -> None:
        """`kernel`: by `advance`; `head`: of `whole`; `reading`: of a span of one token after those in `slot`; `angles`
        as `WholeForward.run` takes them; the first `layers` run, and what follows the last one."""
        self._kv, self._slot, self._reading = kv, slot, reading
        self._tokens = array("q", [0, 0])
        self._found = array("f", [0.0, 0.0])
        self._floor = array("f", [0.0])
        self._written = array("q", [0])
        self._asked = array("q", [0])
        self._vocabulary = head.outputs
        self._logits = torch.empty(head.outputs, dtype=head.types.states)
        self._shared = Shared.of(reading)
        self._step = whole.one_token(self._shared, angles, self._asked, self._logits, layers)
        told = {
            _Word.STEP: address(self._step),
            _Word.TOKENS: address(self._tokens),
            _Word.GIVEN: 1,
            _Word.MOST: 1,
            _Word.FOUND: address(self._found),
            _Word.FLOOR: address(self._floor),
            _Word.WRITTEN: address(self._written),
        }
        self._words = array("q", [told[word] for word in _Word])
        self._kernel = kernel

    def after(self, token: int) -> Choice:
        """Read one token: the most probable one after it.

        Raises IndexError for a token that the model does not have, ArithmeticError where its logits are no numbers.
        """
        self._check(token)
        self._tokens[0] = token
        self._kernel(address(self._words))
        total, weighed = self._found
        chosen = self._tokens[1]
        if chosen >= self._vocabulary:
            raise ArithmeticError(f"the logits after token {token} are no numbers: no token is the most probable")
        log_total = math.log(total)
        return Choice(chosen, -log_total, [], log_total - weighed / total)

    def ahead(self, given: Sequence[int], most: int, floor: float) -> tuple[list[int], list[float]]:
        """Read what is given, then write up to `most` tokens more, for as long as their probability is over `floor`:
        (they, the probability of each after those before it). The last one is not read.

        Nothing can be written after it. Raises IndexError as `after` does; logits that are no numbers end it.
        """
        self._check(max(given))
        tokens, found = array("q", given), array("f", bytes(8 * most))
        tokens.frombytes(bytes(8 * most))
        self._floor[0] = floor
        words = self._words
        words[_Word.TOKENS], words[_Word.FOUND] = address(tokens), address(found)
        words[_Word.GIVEN], words[_Word.MOST] = len(given), most
        self._kernel(address(words))
        written = self._written[0]
        ahead = tokens[len(given) : len(given) + written].tolist()
        if ahead and ahead[-1] >= self._vocabulary:
            ahead.pop()
        return ahead, [1 / total for total in found[: 2 * len(ahead) : 2]]

    def _check(self, token: int) -> None:
        if token >= self._vocabulary:
            raise IndexError(f"token {token}: the model has tokens 0 to {self._vocabulary - 1}; its tokenizer has more")

    def commit(self) -> None:
        """Let the slot hold what was read."""
        self._kv.commit(self._slot, self._reading.positions[0])
