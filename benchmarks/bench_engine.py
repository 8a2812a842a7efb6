"""The local engine beside its bounds and its peers: `make bench-engine`. Prints tables, writes results/engine.json.

`--threads 2` has steps and peers run with two threads each, and writes results/engine-2-threads.json.

Sections: steps (decode steps over the machine's bound, taps), overhead (what of a step is no forward pass), peers
(tokens per second beside transformers, vLLM and llama.cpp), prefix (first token of a shared prompt; cost where nothing
hits), cancel (from the caller's leaving to freed rows).
Values are medians over rounds, ratios are taken within a round. Speculation has a command of its own: engine_spec.
"""

import argparse
import dataclasses
import json
import queue
import statistics
import time
from collections.abc import Callable
from typing import Final

import engine_overhead
import engine_peers
import engine_prefix
import torch
from engine_steps import random_model
from measured import Measured, show
from results_file import Row, write

from local_engine.bench import BATCHES, decode_steps
from local_engine.calibrate import calibrate
from local_engine.engine import Engine
from local_engine.runner import Runner, new_kv
from local_engine.types import Cancel, Event, Finished, Generate, SamplingParams

CANCELS: Final = 200
PACKAGES: Final = ("torch", "transformers")


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    seconds: float
    """Per measured step size."""
    threads: int
    """Of steps and peers; the others have one."""
    published: torch.dtype
    """What the checkpoint of steps and peers is written in."""


def steps(seed: int, into: Measured, setup: Setup) -> None:
    """Decode steps of a random 29M model: of the bound, and what tapping every layer costs."""
    torch.set_num_threads(setup.threads)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("29m", dtype, setup.published)
        runner = Runner(model, new_kv(model, 1 << 30))
        calibration = calibrate(model, runner)
        kind = str(dtype).removeprefix("torch.")
        for step in decode_steps(runner, calibration, BATCHES, seconds=setup.seconds):
            name = f"29M {kind}, batch {step.rows}"
            into.add(name, "step_ms", step.seconds * 1e3, "ms")
            into.add(name, "tokens_per_s", step.rows / step.seconds, "1/s")
            into.add(name, "of_the_bound", step.bound_s / step.seconds, "ratio")
            into.add(name, "taps_cost", step.tapped_s / step.seconds - 1, "ratio")


def overhead(seed: int, into: Measured, setup: Setup) -> None:
    """What of a step at batch 32 is outside the forward pass, greedy and sampled; 29M float32."""
    model = random_model("29m", torch.float32)
    for metric, temperature in (("greedy_outside", 0.0), ("sampled_outside", 1.0)):
        into.add("29M float32, 32 sequences", metric, engine_overhead.outside(model, temperature), "ratio")


def peers(seed: int, into: Measured, setup: Setup) -> None:
    engine_peers.measure(BATCHES, seed, into, setup.threads, setup.published)
    for batch in BATCHES:
        ours = into.last(f"{engine_peers.OURS}, batch {batch}", "tokens_per_s")
        ours_http = into.last(f"{engine_peers.OURS_HTTP}, batch {batch}", "tokens_per_s")
        theirs = into.last(f"{engine_peers.GENERATE}, batch {batch}", "tokens_per_s")
        if ours and theirs:
            into.add(f"{engine_peers.OURS}, batch {batch}", "over_generate", ours / theirs, "ratio")
        for rival, metric in (
            (engine_peers.SERVE, "over_serve"),
            (engine_peers.VLLM_NAME, "over_vllm"),
            (engine_peers.LLAMACPP_NAME, "over_llamacpp"),
        ):
            found = into.last(f"{rival}, batch {batch}", "tokens_per_s")
            if ours_http and found:
                into.add(f"{engine_peers.OURS_HTTP}, batch {batch}", metric, ours_http / found, "ratio")


def prefix(seed: int, into: Measured, setup: Setup) -> None:
    torch.set_num_threads(1)
    for size in engine_prefix.SIZES:
        model = engine_prefix.model_of(size)
        first = engine_prefix.first_token(model, 3)
        for metric in ("cold_median_ms", "warm_median_ms"):
            into.add(f"prefix, {size}", metric, first[metric], "ms")
        into.add(f"prefix, {size}", "times_faster", first["cold_median_ms"] / first["warm_median_ms"], "ratio")
        costs = engine_prefix.cost_without_hits(model, engine_prefix.TURNS[size])
        into.add(f"prefix, {size}", "no_hit_cost", costs["resting_percent"], "%")
        into.add(f"prefix, {size}", "no_hit_cost_while_storing", costs["storing_percent"], "%")


def cancel(seed: int, into: Measured, setup: Setup) -> None:
    """From a caller's leaving to freed rows, while eight others decode and a long prompt is read; 29M."""
    torch.set_num_threads(1)
    model = random_model("29m", torch.float32)
    engine = Engine({"m": dataclasses.replace(model, end_tokens=frozenset())}, max_running=16)
    engine.start()
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(arrived.put)
    try:
        for id in range(8):
            link.submit(_generate(id, engine_peers.digits(seed + id, 100), 3000))
        link.submit(_generate(8, engine_peers.digits(seed + 8, 100), 2))  # over when the others have been read
        _finish(8, arrived)
        waits = []
        for turn in range(CANCELS):
            id = 100 + turn
            link.submit(_generate(id, engine_peers.digits(seed + id, 900), 500))
            time.sleep(0.02 * (turn % 10))  # at any phase: in line, while its prompt is read, while it decodes
            began = time.perf_counter()
            link.submit(Cancel(id))
            _finish(id, arrived)
            waits.append(time.perf_counter() - began)
    finally:
        link.close()
        engine.stop()
    into.add("cancel to freed rows", "p50_ms", 1e3 * statistics.median(waits), "ms")
    into.add("cancel to freed rows", "p99_ms", 1e3 * statistics.quantiles(waits, n=100)[98], "ms")


def _finish(id: int, arrived: "queue.SimpleQueue[list[Event]]") -> None:
    while not any(isinstance(event, Finished) and event.id == id for event in arrived.get(timeout=60)):
        pass


def _generate(id: int, text: str, tokens: int) -> Generate:
    said = json.dumps([{"role": "user", "content": text}]).encode()
    return Generate(id, "m", said, SamplingParams(temperature=0, max_tokens=tokens))


SECTIONS: dict[str, Callable[[int, Measured, Setup], None]] = {
    "steps": steps, "overhead": overhead, "peers": peers, "prefix": prefix, "cancel": cancel,
}  # fmt: skip


def tables(rows: list[Row], threads: int) -> None:
    show(rows, f"Decode steps, {threads} thread(s)", {
        "step_ms": "ms", "tokens_per_s": "tokens/s", "of_the_bound": "of the bound", "taps_cost": "all layers tapped",
    })  # fmt: skip
    show(rows, "Of a step, outside the forward pass", {
        "greedy_outside": "greedy", "sampled_outside": "temperature 1, with sampling",
    })  # fmt: skip
    show(rows, f"Peers, 29M float32, {threads} thread(s)", {
        "over_generate": "× generate", "over_serve": "× transformers serve", "over_vllm": "× vLLM",
        "over_llamacpp": "× llama.cpp",
    })  # fmt: skip
    show(rows, "1,000 shared tokens", {
        "cold_median_ms": "cold, ms", "warm_median_ms": "shared, ms", "times_faster": "×",
        "no_hit_cost": "no hits, % CPU",
    })  # fmt: skip
    show(rows, "Cancel", {"p50_ms": "p50, ms", "p99_ms": "p99, ms"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measured step size")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), help="default: all, with --threads or --published steps and peers"
    )
    parser.add_argument("--threads", type=int, default=1, help="of steps and peers; the others have one")
    parser.add_argument("--published", action="store_true", help="the checkpoint is in bfloat16, as most that are")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    usual = options.threads == 1 and not options.published
    sections = options.only or (list(SECTIONS) if usual else ["steps", "peers"])
    setup = Setup(options.seconds, options.threads, torch.bfloat16 if options.published else torch.float32)
    found = Measured()
    for turn in range(options.rounds):
        for name in sections:
            began = time.monotonic()
            SECTIONS[name](options.seed + 10_000_000 * turn, found, setup)
            print(f"round {turn + 1}, {name}: {time.monotonic() - began:.0f} s", flush=True)
    rows = found.rows()
    tables(rows, options.threads)
    if not options.no_write:
        name, command = "engine", "make bench-engine" if usual else "python benchmarks/bench_engine.py"
        if options.threads > 1:
            name, command = f"{name}-{options.threads}-threads", f"{command} --threads {options.threads}"
        if options.published:
            name, command = f"{name}-published", f"{command} --published"
        peers_met = engine_peers.versions() if "peers" in sections else {}
        print(write(name, command, PACKAGES, rows, **peers_met))


if __name__ == "__main__":
    main()
