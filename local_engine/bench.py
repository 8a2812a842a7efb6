"""`leadline engine bench`: how fast a model decodes here, and how far that is from what the machine can do."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from local_engine.calibrate import Calibration, calibrate
from local_engine.config import Device, Dtype
from local_engine.model import load_model
from local_engine.runner import Runner, Segment, new_kv

BATCHES: Final = (1, 8, 32)
CONTEXT: Final = 128
KV_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class StepTime:
    """One decode step of a batch."""

    rows: int
    seconds: float
    bound_s: float
    """The least that memory and arithmetic allow: `Calibration.bound_s`."""
    tapped_s: float
    """The same step with the hidden states of every layer at every row."""


def decode_steps(
    runner: Runner,
    calibration: Calibration,
    batches: Sequence[int] = BATCHES,
    context: int = CONTEXT,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[StepTime]:
    """Least time of a decode step at each batch size, every row over `context` tokens; about `seconds` per size."""
    times = []
    for batch in batches:
        slots = [runner.kv.open(context + 1) for _ in range(batch)]
        for slot in slots:
            runner.run([Segment(slot, 0, [0] * context)])
        plain = [Segment(slot, context, [0], logits=1) for slot in slots]
        tapped = [Segment(slot, context, [0], logits=1, taps=(0,)) for slot in slots]
        every = range(runner.layers + 1)
        plain_s, tapped_s = _interleaved(
            [partial(runner.run, plain), partial(runner.run, tapped, tap_layers=every)],
            partial(_truncate, runner, slots, context),
            seconds,
            clock,
        )
        times.append(StepTime(batch, plain_s, calibration.bound_s([(1, context + 1)] * batch), tapped_s))
        for slot in slots:
            runner.kv.close(slot)
    return times


def _truncate(runner: Runner, slots: Sequence[int], length: int) -> None:
    for slot in slots:
        runner.kv.truncate(slot, length)


def _interleaved(
    runs: Sequence[Callable[[], object]], undo: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> list[float]:
    """Least time of each, taken in turns, so that what else the machine does meets all of them alike."""
    least = [float("inf")] * len(runs)
    until = time.perf_counter() + seconds
    first = True
    while time.perf_counter() < until or first:
        for index, run in enumerate(runs):
            begin = clock()
            run()
            least[index] = min(least[index], clock() - begin)
            undo()
        first = False
    return least


def report(source: str, dtype: Dtype, device: Device, threads: int) -> list[str]:
    """Lines for a person. Raises ModelLoadError, ConfigError."""
    torch.set_num_threads(threads)
    model = load_model("model", source, dtype, device)
    runner = Runner(model, new_kv(model, KV_BYTES))
    found = calibrate(model, runner)
    kind = str(next(model.network.parameters()).dtype).removeprefix("torch.")
    lines = [
        f"{source}: {model.card.parameters / 1e6:.1f}M parameters, {kind}, on {model.device}, {threads} thread(s)",
        f"this machine: {found.bytes_per_s / 1e9:.1f} GB/s (one row), {found.flops_per_s / 1e9:,.0f} GFLOP/s (many)",
        f"{'batch':>5} {'step':>10} {'tokens/s':>10} {'of the bound':>13} {'all layers tapped':>18}",
    ]
    context = min(CONTEXT, model.card.context_window - 1)
    times = decode_steps(runner, found, context=context)
    lines += [
        f"{step.rows:>5} {step.seconds * 1e3:>7.2f} ms {step.rows / step.seconds:>10,.0f}"
        f" {step.bound_s / step.seconds:>13.0%} {step.tapped_s / step.seconds - 1:>+18.1%}"
        for step in times
    ]
    if any(step.bound_s > step.seconds for step in times):
        lines.append(
            "over 100%: weights that fit the CPU's caches are read faster than memory, which the bound is made of"
        )
    return lines
