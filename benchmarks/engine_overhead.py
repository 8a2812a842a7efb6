"""What of a decode step is not the model's forward pass: scheduling, sampling, detokenisation, telling, bookkeeping."""

import dataclasses
import json
import queue
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import torch

from local_engine.engine import Engine
from local_engine.kv import KVCache
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment, StepOutput
from local_engine.types import Event, Finished, Generate, SamplingParams

SEQUENCES: Final = 32
TOKENS: Final = 120


class Watched(Runner):
    """A runner that notes when each pass of all sequences, a token each, began and ended."""

    def __init__(self, model: LocalModel, kv: KVCache) -> None:
        super().__init__(model, kv)
        self.passes: list[tuple[float, float]] = []

    def run(self, segments: Sequence[Segment], **how: Any) -> StepOutput:
        began = time.perf_counter()
        output = super().run(segments, **how)
        if [len(segment.tokens) for segment in segments] == [1] * SEQUENCES:
            self.passes.append((began, time.perf_counter()))
        return output


def outside(model: LocalModel, temperature: float) -> float:
    """The median share of a step of 32 sequences that passes between two forward passes. One thread."""
    torch.set_num_threads(1)
    runners: list[Watched] = []

    def watched(model: LocalModel, kv: KVCache) -> Watched:
        runners.append(Watched(model, kv))
        return runners[-1]

    endless = dataclasses.replace(model, end_tokens=frozenset())
    engine = Engine({"m": endless}, max_running=SEQUENCES, make_runner=watched)
    engine.start()
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(arrived.put)
    sampling = SamplingParams(temperature=temperature, max_tokens=TOKENS)
    for id in range(SEQUENCES):
        said = json.dumps([{"role": "user", "content": f"Say {id} things."}]).encode()
        link.submit(Generate(id, "m", said, sampling))
    left = SEQUENCES
    while left:
        left -= sum(isinstance(event, Finished) for event in arrived.get(timeout=60))
    link.close()
    engine.stop()
    shares = [1 - (end - began) / (after - began) for (began, end), (after, _) in pairwise(runners[0].passes)]
    assert len(shares) > TOKENS // 2, "or they did not decode together"
    return statistics.median(shares)
