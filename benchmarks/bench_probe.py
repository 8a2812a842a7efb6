"""What the shipped probe is worth and what it costs: `python benchmarks/bench_probe.py`.

Out-of-fold rows come from the artifact, as fitted; here are measured the transfer to GSM8K, which it never saw, and
the time of one query on one thread. Writes benchmarks/results/probe-default.json.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from results_file import write
from rich.console import Console

from probes.artifact import read
from probes.evaluate import Row
from probes.extract import DEFAULT_SHA256, Encoder, file_sha256, locate
from probes.manifest import default_artifact_path
from probes.report import render_rows
from probes.runtime import EncoderProbe
from probes.train import read_table, score, table_rows

DATA = Path(os.environ.get("LEADLINE_DATA") or Path(__file__).parents[2] / "shared" / "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=Path, nargs="?", default=DATA, help="folder with routellm_mmlu.parquet and routellm_gsm8k.parquet"
    )
    parser.add_argument("--queries", type=int, default=300, help="queries to time")
    args = parser.parse_args()
    if not (args.data / "routellm_mmlu.parquet").exists():
        print(f"no routing data in {args.data}: name its folder as the argument, or in LEADLINE_DATA; nothing measured")
        return
    torch.set_num_threads(1)

    artifact = read(default_artifact_path())
    rows = [
        Row(f"MMLU out of fold | {row['name']}", *(row[key] for key in ("metric", "value", "low", "high", "unit")))
        for row in artifact.manifest.metrics["out_of_fold"]
    ]
    heads = {"weak": "mixtral_8x7b_correct", "strong": "gpt4_1106_correct"}
    gsm8k = read_table(args.data / "routellm_gsm8k.parquet", "prompt", heads, drop_if="contaminated")
    transfer = table_rows(gsm8k, {"probe": score(gsm8k, artifact, Encoder.load())})
    rows += [Row(f"GSM8K transfer | {r.name}", r.metric, r.value, r.low, r.high, r.unit) for r in transfer]
    rows += latency_rows(args.data, args.queries)

    Console(width=130).print(render_rows(artifact.version, rows))
    print(write("probe-default", "make bench-probe", artifact.manifest.versions, rows, artifact=artifact.version))


def latency_rows(data: Path, n: int) -> list[Row]:
    """Load time, and wall time of one query at a time on one thread; low and high are p5 and p95."""
    start = time.perf_counter()
    probe = EncoderProbe.load()
    rows = [Row("runtime", "load (imports done)", time.perf_counter() - start, unit="s")]
    weights = locate("default")[0] / "model.safetensors"
    hashing = _times(lambda: file_sha256(weights) == DEFAULT_SHA256, 5)
    rows.append(Row("runtime", "hash of the encoder", float(np.median(hashing)), unit="s"))
    for name in ("routellm_mmlu", "routellm_gsm8k"):
        prompts = pd.read_parquet(data / f"{name}.parquet")["prompt"].sample(n, random_state=0).tolist()
        probe.probe([[{"role": "user", "content": prompts[0]}]])
        times = [
            1e3 * _times(lambda p=prompt: probe.probe([[{"role": "user", "content": p}]]), 1)[0] for prompt in prompts
        ]
        low, middle, high = np.quantile(times, [0.05, 0.5, 0.95])
        rows.append(Row(f"runtime | {name}", "batch 1, median (p5 to p95)", middle, low, high, "ms"))
    return rows


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out


if __name__ == "__main__":
    main()
