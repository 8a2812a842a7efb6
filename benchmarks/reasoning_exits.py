"""Leaving thoughts early: every method beside leaving it off, and whether the promises hold. Synthetic arithmetic.

High effort, greedy, questions of the half that no artifact was fitted on (`trajectories.half_of`), so that another seed
draws fresh ones. The promises are put to the test on trajectories of those questions: over 200 random halves, each
calibrated on the other.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measured import Measured

from gateway.exits.compare import compare
from gateway.exits.fitting import proofs
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.reason.trajectories import Question, arithmetic_questions, trace
from local_engine.types import SamplingParams

DELTAS = (0.01, 0.05, 0.1)
THINK = SamplingParams(temperature=0, effort="high", max_tokens=600)
COLUMNS = {
    "accuracy": "right", "points_over_off": "points over off", "tokens": "tokens", "tokens_saved": "tokens saved",
    "cpu_saved": "CPU saved", "wall_saved": "wall saved", "left": "left early", "risk": "and wrong", "harm": "harm",
}  # fmt: skip
PROOF_COLUMNS = {"mean_risk": "mean risk", "held": "held", "share_left": "left early", "trajectories": "trajectories"}


def questions(seed: int, levels: Sequence[int], n: int) -> list[Question]:
    """`n` of each level, levels in turn."""
    found = arithmetic_questions(seed, n, "test")
    by_level = [[one for one in found if one.group == f"level {level}"] for level in levels]
    return [one for group in zip(*by_level, strict=True) for one in group]


def measure(seed: int, levels: Sequence[int], n: int, batches: Sequence[int], into: Measured) -> None:
    torch.set_num_threads(1)
    asked = questions(seed, levels, n)
    model = load_model("base", "bundled/base", dtype="float32", device="cpu")
    engine = Engine({"m": model}, max_running=max(8, *batches), prefix_bytes=0)
    engine.start()
    try:
        for batch in batches:
            for row in compare(engine, "m", asked, THINK, together=batch):
                name = f"exits, batch {batch}: {row.name}"
                into.add(name, "accuracy", row.accuracy[0], "share")
                into.add(name, "problems", row.n, "problems")
                into.add(name, "points_over_off", 100 * row.gain[0], "points")
                into.add(name, "tokens", row.tokens, "tokens")
                for metric in ("tokens_saved", "cpu_saved", "wall_saved", "left", "risk", "harm"):
                    into.add(name, metric, getattr(row, metric), "share")
        with tempfile.TemporaryDirectory() as folder:
            seen = list(trace(engine, "m", asked, Path(folder) / "trajectories", sampling=THINK, together=16))
    finally:
        engine.stop()
    assert model.exits is not None, "one is shipped"
    for proof in proofs(model.exits, seen, deltas=DELTAS, fresh=True):
        name = f"exits, promise: {proof['form']}, delta {proof['delta']:g}"
        into.add(name, "mean_risk", proof["mean_risk"], "share")
        into.add(name, "held", proof["held"], "share")
        into.add(name, "share_left", proof["left"], "share")
        into.add(name, "trajectories", proof["trajectories"], "trajectories")
