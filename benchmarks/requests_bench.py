"""Whole answers: requests per second of one core, CPU per request, added latency, memory, and nothing lost.

wrk and the canned upstream (nginx) share the first core, the gateway has the second to itself. After each run the
ledger must hold exactly one row for every request that wrk counted, up to those in flight when it stopped.
"""

import contextlib
import json
import os
import sqlite3
import subprocess
import tempfile
from pathlib import Path

from contenders import GATEWAY_CORE, HERE, LOAD_CORE, MOCK_PORT, PORT, Contender, cpu_s, rss_mb
from measured import Measured, show
from results_file import Row

RIVALS = ("nginx", "aiohttp-proxy", "litellm")
CROWD = 256


def wrk(
    port: int, connections: int, seconds: float, env: dict[str, str], key: str, seed: int, core: str | None = LOAD_CORE
) -> dict[str, int]:
    """What load.lua counted. Raises RuntimeError for a single error."""
    on = ["taskset", "-c", core] if core is not None else []
    out = subprocess.run(
        [*on, "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(HERE / "load.lua"),
         f"http://127.0.0.1:{port}/v1/chat/completions"],
        env={**os.environ, "BENCH_KEY": key, "BENCH_SEED": str(seed), **env},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    line = next(line for line in out.splitlines() if line.startswith("RESULT "))
    result: dict[str, int] = json.loads(line.removeprefix("RESULT "))
    if result["bad_status"] or result["socket_errors"]:
        raise RuntimeError(f"errors under load with {connections} connections: {result}")
    return result


def direct_us(seconds: float) -> dict[str, int]:
    """The upstream's own latency, without a gateway: what a contender adds is counted from there."""
    return wrk(MOCK_PORT, 1, min(seconds, 2), {}, "none", 0)


def measure(contender: Contender, seconds: float, seed: int, direct: dict[str, int], into: Measured) -> None:
    name = contender.name
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder:
        running = contender.start(Path(folder) / name, MOCK_PORT)
        pid = running.process.pid
        try:
            into.add(name, "rss_idle", rss_mb(pid), "MB")
            runs = [wrk(PORT, 16, 1, contender.env, running.key, seed)]
            alone = wrk(PORT, 1, min(seconds, 3), contender.env, running.key, seed + 1)
            before = cpu_s(pid)
            busy = wrk(PORT, 64, seconds, contender.env, running.key, seed + 2)
            cpu_ms = (cpu_s(pid) - before) * 1000 / busy["requests"]
            runs += [alone, busy]
            connections = 16 + 1 + 64
            if name == "leadline":
                crowd = wrk(PORT, CROWD, min(seconds, 3), contender.env, running.key, seed + 3)
                into.add(name, "requests_per_s_c256", crowd["requests"] * 1e6 / crowd["duration_us"], "1/s")
                runs.append(crowd)
                connections += CROWD
            into.add(name, "rss_loaded", rss_mb(pid), "MB")
        finally:
            running.stop()
        if running.home is not None:
            check_ledger(running.home, sum(run["requests"] for run in runs), connections)
            if name == "leadline":  # wrk() and check_ledger() raise for a single one
                into.add(name, "errors_c256", 0, "count")
                into.add(name, "lost_rows_c256", 0, "count")
    into.add(name, "requests_per_s_c64", busy["requests"] * 1e6 / busy["duration_us"], "1/s")
    into.add(name, "cpu_per_request", cpu_ms, "ms")
    into.add(name, "added_p50_c1", (alone["p50_us"] - direct["p50_us"]) / 1000, "ms")
    into.add(name, "added_p99_c1_noise", (alone["p99_us"] - direct["p99_us"]) / 1000, "ms")
    print(f"  {name}: {busy['requests'] * 1e6 / busy['duration_us']:,.0f}/s, {cpu_ms:.3f} ms CPU", flush=True)


def check_ledger(home: Path, requests: int, in_flight: int) -> None:
    """Raises unless every counted request has its row. Those in flight when wrk stopped have rows of their own."""
    with contextlib.closing(sqlite3.connect(home / "ledger.db")) as database:
        rows, ok = database.execute("SELECT count(*), sum(outcome = 'ok') FROM request").fetchone()
    if not requests <= (ok or 0) <= rows <= requests + in_flight:
        raise RuntimeError(f"{requests} requests answered, {rows} rows in the ledger, {ok} of them ok")


def tables(rows: list[Row], direct: dict[str, int]) -> None:
    columns = {
        "requests_per_s_c64": "requests/s, c=64", "cpu_per_request": "CPU ms/request",
        "added_p50_c1": "added p50, c=1, ms", "added_p99_c1_noise": "(added p99: noise)",
        "requests_per_s_c64_over_litellm": "× LiteLLM", "requests_per_s_c64_over_aiohttp-proxy": "× aiohttp",
        "requests_per_s_c64_over_nginx": "× nginx",
    }  # fmt: skip
    title = f"Whole answers, core {GATEWAY_CORE} alone; direct p50 {direct['p50_us'] / 1000:.3f} ms"
    show(rows, title, columns, "p99 at c=1 is the virtual machine's noise: nothing is concluded from it.")
    memory = {
        "rss_idle": "MB idle", "rss_loaded": "MB after load", "requests_per_s_c256": "requests/s, c=256",
        "errors_c256": "errors, c=256", "lost_rows_c256": "rows lost, c=256",
    }  # fmt: skip
    note = "After load: Leadline's holds the answers of every prompt in its cache (up to LEADLINE_CACHE_MIB, 4)."
    show(rows, "Resident memory of the serving process", memory, note)
