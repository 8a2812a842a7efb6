"""What this machine can do with this model, measured in about two seconds.

Draft lengths are chosen by the time of a step over its rows; a benchmark is read against the bound that memory and
arithmetic set: t >= max((weights + keys and values) / bandwidth, operations / peak).
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from local_engine.model import LocalModel
from local_engine.products import best_product
from local_engine.runner import Runner, Segment

ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT: Final = 32
"""Tokens before the measured ones, few enough that attention does not count."""
_SIDE: Final = 2048
_READ_BYTES: Final = 128 << 20
"""Of weights that are read in turn, of every type: more than a core's caches hold, and than stays in a last one that is
shared. An Intel Xeon's gives 25 GB/s of 64 MiB that were read 3 ms ago, and memory 15 to 20."""
_GEMM_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Calibration:
    bytes_per_s: float
    """Of a product with one row."""
    flops_per_s: float
    """Of a product with many rows, in the model's type."""
    step_s: tuple[float, ...]
    """Seconds of a step over as many tokens as ROWS says."""
    weights: int
    """Weights that a step multiplies with: all but an embedding table that is only looked up."""
    weight_bytes: int
    """Of those, as they are held."""
    token_bytes: int
    attention_width: int
    """layers * query_heads * head_dim."""

    def seconds(self, rows: int) -> float:
        """A step over `rows` tokens: linear between the measured ones, and beyond the last in proportion."""
        if rows >= ROWS[-1]:
            return self.step_s[-1] * rows / ROWS[-1]
        above = bisect_left(ROWS, rows)
        if ROWS[above] == rows:
            return self.step_s[above]
        share = (rows - ROWS[above - 1]) / (ROWS[above] - ROWS[above - 1])
        return self.step_s[above - 1] + share * (self.step_s[above] - self.step_s[above - 1])

    def bound_s(self, spans: Sequence[tuple[int, int]]) -> float:
        """Least seconds of a step over spans of (tokens computed, tokens then held)."""
        read = self.weight_bytes + self.token_bytes * sum(held for _, held in spans)
        products = 2 * self.weights * sum(computed for computed, _ in spans)
        attention = 4 * self.attention_width * sum(computed * held for computed, held in spans)
        return max(read / self.bytes_per_s, (products + attention) / self.flops_per_s)


def calibrate(
    model: LocalModel, runner: Runner, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> Calibration:
    """Measure in about `seconds`: the least of the repetitions that fit. Takes one slot of the runner's KV cache.

    With `time.process_time` as clock and one thread, what else a shared machine runs counts less.
    """
    network, shape = model.network, runner.kv.shape
    embedding = network.get_input_embeddings().weight
    looked_up = 0 if network.config.tie_word_embeddings else embedding.numel()
    weights = model.card.parameters - looked_up
    layers, head = runner.held
    bandwidth, peak = _machine(embedding.dtype, layers, _Watch(model.device, clock), seconds / 2)
    return Calibration(
        bytes_per_s=bandwidth,
        flops_per_s=peak,
        step_s=_steps(runner, _Watch(model.device, clock), seconds / 2),
        weights=weights,
        weight_bytes=(weights - embedding.numel()) * layers.itemsize + embedding.numel() * head.itemsize,
        token_bytes=shape.token_bytes,
        attention_width=shape.layers * shape.query_heads * shape.head_dim,
    )


@torch.inference_mode()
def _machine(dtype: torch.dtype, held: torch.dtype, watch: "_Watch", seconds: float) -> tuple[float, float]:
    """(bytes per second, operations per second), of weights held so."""
    ones = torch.ones(_SIDE, _SIDE, dtype=dtype, device=watch.device)
    each = ones.numel() * held.itemsize
    products = [best_product(ones.clone(), None, held) for _ in range(_READ_BYTES // each)]

    one, many = (torch.ones(rows, _SIDE, dtype=dtype, device=watch.device) for rows in (1, _GEMM_ROWS))
    gemv_s = watch.least_s(lambda: [product(one) for product in products][-1], seconds / 2)
    gemm_s = watch.least_s(lambda: products[0](many), seconds / 2)
    return len(products) * each / gemv_s, 2 * ones.numel() * _GEMM_ROWS / gemm_s


def _steps(runner: Runner, watch: "_Watch", seconds: float) -> tuple[float, ...]:
    longest = _CONTEXT + ROWS[-1]
    slot = runner.kv.open(longest)
    try:
        runner.run([Segment(slot, 0, [0] * _CONTEXT)])

        def step(rows: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                runner.kv.truncate(slot, _CONTEXT)
                return runner.run([Segment(slot, _CONTEXT, [0] * rows, logits=rows)]).logits

            return run

        return tuple(watch.least_s(step(rows), seconds / len(ROWS)) for rows in ROWS)
    finally:
        runner.kv.close(slot)


@dataclass(frozen=True, slots=True)
class _Watch:
    device: torch.device
    clock: Callable[[], float]

    def least_s(self, run: Callable[[], Tensor], seconds: float) -> float:
        """Least time of one run, after one that does not count; at least three are measured."""
        self._timed(run)
        until = time.perf_counter() + seconds
        least = min(self._timed(run) for _ in range(3))
        while time.perf_counter() < until:
            least = min(least, self._timed(run))
        return least

    def _timed(self, run: Callable[[], Tensor]) -> float:
        begin = self.clock()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() - begin
