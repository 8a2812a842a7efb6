"""Votes: how many samples it takes to answer as well as sixteen do. Synthetic arithmetic.

Temperature 0.7, both efforts. Compared with self-consistency over 16 samples, the row against which the others are
measured; "leave it off" is one greedy answer.
"""

from collections.abc import Sequence

import torch
from measured import Measured
from reasoning_exits import questions

from gateway.exits.compare import Method, compare
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.types import Effort, Exit, SamplingParams, Vote

EFFORTS: tuple[Effort, ...] = ("low", "high")
METHODS = {
    "self-consistency, 16": Method(Vote(stop="never", weigh="count")),
    "leave it off: one, greedy": Method(temperature=0.0),
    "one sample": Method(),
    "adaptive, posterior 0.9": Method(Vote()),
    "adaptive, posterior 0.9, by count": Method(Vote(weigh="count")),
    "adaptive, posterior 0.9, by perplexity": Method(Vote(weigh="perplexity")),
    "adaptive, posterior 0.95": Method(Vote(bound=0.95)),
    "adaptive, entropy 0.5": Method(Vote(stop="entropy", bound=0.5)),
    "adaptive, three agree": Method(Vote(stop="agreement")),
    "adaptive, posterior 0.9, pruned at -1": Method(Vote(prune=-1.0)),
}
WITH_EXITS = {"adaptive, posterior 0.9, each left by probe 0.05": Method(Vote(exit=Exit(delta=0.05)))}
COLUMNS = {
    "accuracy": "right", "points_over_16": "points over 16", "samples": "samples", "tokens": "tokens",
    "tokens_saved": "tokens saved", "cpu_saved": "CPU saved", "wall_saved": "wall saved",
}  # fmt: skip


def measure(seed: int, levels: Sequence[int], n: int, batches: Sequence[int], into: Measured) -> None:
    torch.set_num_threads(1)
    asked = questions(seed, levels, n)
    model = load_model("base", "bundled/base", dtype="float32", device="cpu")
    engine = Engine({"m": model}, max_running=16 * max(batches), prefix_bytes=0)
    engine.start()
    try:
        for batch in batches:
            for effort in EFFORTS:
                sampling = SamplingParams(temperature=0.7, seed=seed, effort=effort, max_tokens=600)
                methods = METHODS | (WITH_EXITS if effort == "high" else {})
                for row in compare(engine, "m", asked, sampling, methods, together=batch):
                    name = f"samples, {effort}, batch {batch}: {row.name}"
                    into.add(name, "accuracy", row.accuracy[0], "share")
                    into.add(name, "problems", row.n, "problems")
                    into.add(name, "points_over_16", 100 * row.gain[0], "points")
                    into.add(name, "samples", row.samples, "samples")
                    into.add(name, "tokens", row.tokens, "tokens")
                    for metric in ("tokens_saved", "cpu_saved", "wall_saved"):
                        into.add(name, metric, getattr(row, metric), "share")
    finally:
        engine.stop()
