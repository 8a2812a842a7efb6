"""What the cheap probe tiers cost a query: `python benchmarks/probe_latency.py` (PYTHONPATH=. from a checkout).

CPU time of this process, one thread, the least of several rounds: the words read in a gateway worker, for prompts of 50
to 500 characters, and the encoder of the engine process, in batches of 16.
"""

import json
import random
import time
from collections.abc import Callable, Sequence

import torch

from local_engine.arithmetic import LEVELS, other_prompt, problems
from probes.evaluate import Row
from probes.manifest import ARTIFACTS
from probes.runtime import EncoderProbe
from probes.static import StaticProbe
from probes.text import render

ROUNDS = 7
BATCH = 16


def latency_rows(rounds: int = ROUNDS) -> list[Row]:
    """Microseconds a query of the shipped static probe, rendering included, and milliseconds of the shipped encoder."""
    prompts = typical_prompts()
    rows: list[Row] = []
    probe = StaticProbe.load(ARTIFACTS / "static")
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    each = _least(lambda: [probe.read(render(one)) for one in conversations], rounds) / len(prompts)
    rows.append(Row(f"static, {len(prompts)} prompts of 50 to 500 characters", "latency", each * 1e6, unit="µs"))
    torch.set_num_threads(1)
    encoder = EncoderProbe.load()
    batch = conversations[:BATCH]
    alone = _least(lambda: [encoder.sound([one]) for one in batch], rounds)
    together = _least(lambda: encoder.sound(batch), rounds)
    for name, took in (("alone", alone), (f"in a batch of {BATCH}", together)):
        rows.append(Row(f"encoder, {name}", "latency", took / BATCH * 1e3, unit="ms"))
    return rows


def typical_prompts(n: int = 160) -> list[str]:
    """Sums, word problems and prompts of other kinds, of 50 to 500 characters."""
    rng = random.Random(0)
    drawn = [problem.question for level in LEVELS for problem in problems(3, level, n)]
    drawn += [" ".join(other_prompt(rng) for _ in range(rng.randrange(1, 8))) for _ in range(3 * n)]
    fit = [prompt for prompt in drawn if 50 <= len(prompt) <= 500]
    rng.shuffle(fit)
    return fit[:n]


def _least(work: Callable[[], Sequence[object]], rounds: int) -> float:
    """CPU seconds of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


if __name__ == "__main__":
    for row in latency_rows():
        print(json.dumps(row.to_json(), ensure_ascii=False))
