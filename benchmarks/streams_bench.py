"""Paced streams: CPU per stream at a steady rate, hence streams per second of one core, and added time to first byte.

A stream is 54 server-sent events, one write each, 10 ms apart, offered in an open loop: every event is a read and a
write of its own, as in production. The paced upstream and the callers (`paced_upstream.py`, `paced_load.py`) share the
first core. A run counts only if both kept their pace, every stream ended with `[DONE]`, and the ledger holds one row
for each.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import GATEWAY_CORE, HERE, LOAD_CORE, PACED_PORT, PORT, Contender, cpu_s, wait_for
from measured import Measured, show
from paced_upstream import EVENTS
from requests_bench import RIVALS
from results_file import Row

STREAM_MS = (EVENTS - 1) * 10
LATEST_MS = 10.0
"""A start, or an event of the upstream, that is later than this in more than one of a hundred: the pace is not kept."""


class PaceLost(RuntimeError):
    """The load or the upstream, not the gateway, set the pace: the run says nothing."""


class PacedUpstream:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def lateness(self) -> dict[str, float]:
        """Of the ticks since the last time it was asked."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGUSR1)
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found


@contextlib.contextmanager
def paced_upstream() -> Iterator[PacedUpstream]:
    command = ["taskset", "-c", LOAD_CORE, sys.executable, str(HERE / "paced_upstream.py"), str(PACED_PORT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        wait_for(PACED_PORT)
        yield PacedUpstream(process)
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def call(port: int, seconds: float, rate: str, seed: int, key: str = "none") -> dict[str, Any]:
    """What paced_load.py counted. Raises RuntimeError for a single stream without its end."""
    command = ["taskset", "-c", LOAD_CORE, sys.executable, str(HERE / "paced_load.py")]
    out = subprocess.run(
        [*command, str(port), str(seconds), rate, str(seed)],
        env={**os.environ, "BENCH_KEY": key}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    result: dict[str, Any] = json.loads(out)
    if result["broken"] or not result["streams"]:
        raise RuntimeError(f"streams without their end: {result}")
    return result


def direct_first_us(seconds: float) -> float:
    """Time to the first byte without a gateway."""
    return float(call(PACED_PORT, min(seconds, 2), "one", 0)["first_p50_us"])


def measure(
    contender: Contender, seconds: float, seed: int, upstream: PacedUpstream, direct_us: float, into: Measured
) -> None:
    name, rate = contender.name, contender.streams_per_s
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder:
        running = contender.start(Path(folder) / name, PACED_PORT)
        try:
            runs = [call(PORT, 1, str(min(rate, 50)), seed, running.key)]
            alone = call(PORT, min(seconds, 3), "one", seed + 1, running.key)
            for tries_left in (2, 1, 0):
                upstream.lateness()
                before = cpu_s(running.process.pid)
                paced = call(PORT, seconds, str(rate), seed + 10 + tries_left, running.key)
                used_s = cpu_s(running.process.pid) - before
                late = upstream.lateness()
                runs.append(paced)
                wrong = pace_lost(paced, late, rate)
                if not wrong:
                    break
                print(f"  {name}: {wrong}; {tries_left} more tries", flush=True)
            else:
                raise PaceLost(wrong)
            runs.append(alone)
        finally:
            running.stop()
        if running.home is not None:
            check_ledger(running.home, sum(run["streams"] for run in runs))
    cpu_ms = used_s * 1000 / paced["streams"]
    into.add(name, "cpu_per_stream", cpu_ms, "ms")
    into.add(name, "streams_per_s", 1000 / cpu_ms, "1/s")
    into.add(name, "streams_offered", rate, "1/s")
    into.add(name, "streams_started", paced["started_per_s"], "1/s")
    into.add(name, "stream_lasted_p50", paced["lasted_p50_ms"], "ms")
    into.add(name, "reads_per_stream", paced["reads_per_stream"], "count")
    into.add(name, "upstream_late_p99", late["late_p99_ms"], "ms")
    into.add(name, "added_first_byte_p50_c1", (alone["first_p50_us"] - direct_us) / 1000, "ms")
    print(f"  {name}: {cpu_ms:.2f} ms CPU per stream, {1000 / cpu_ms:,.0f} streams/s per core", flush=True)


def pace_lost(paced: dict[str, Any], late: dict[str, float], rate: float) -> str:
    """Why the load, the upstream or the gateway did not keep the pace of the streams; empty: they did."""
    wrong = []
    if paced["started_per_s"] < 0.97 * rate:
        wrong.append(f"{paced['started_per_s']:.0f} of {rate:g} streams/s were started")
    if paced["start_late_p99_ms"] > LATEST_MS:
        wrong.append(f"starts were {paced['start_late_p99_ms']:.1f} ms late (p99)")
    if late["late_p99_ms"] > LATEST_MS:
        wrong.append(f"the upstream's events were {late['late_p99_ms']:.1f} ms late (p99)")
    if not 0.9 * STREAM_MS < paced["lasted_p50_ms"] < 1.1 * STREAM_MS:
        wrong.append(f"a stream of {STREAM_MS} ms took {paced['lasted_p50_ms']:.0f} ms (p50)")
    return "; ".join(wrong)


def check_ledger(home: Path, streams: int) -> None:
    """Raises unless the ledger holds one row for each stream, and no other."""
    with contextlib.closing(sqlite3.connect(home / "ledger.db")) as database:
        rows, ok = database.execute("SELECT count(*), sum(outcome = 'ok') FROM request WHERE stream").fetchone()
    if not streams == rows == ok:
        raise RuntimeError(f"{streams} streams ended, {rows} rows in the ledger, {ok} of them ok")


def tables(rows: list[Row], direct_us: float) -> None:
    columns = {
        "streams_per_s": "streams/s per core", "cpu_per_stream": "CPU ms/stream",
        "added_first_byte_p50_c1": "added first byte, c=1, ms",
        **{f"streams_per_s_over_{rival}": f"× {rival}" for rival in RIVALS},
    }  # fmt: skip
    note = "streams/s per core = 1000 / CPU ms per stream, at the offered rate; each stream ended with [DONE]."
    show(rows, f"Paced streams, core {GATEWAY_CORE} alone; direct first byte {direct_us / 1000:.3f} ms", columns, note)
    pace = {
        "streams_offered": "offered/s", "streams_started": "started/s", "stream_lasted_p50": f"ms (of {STREAM_MS})",
        "reads_per_stream": f"reads (of {EVENTS})", "upstream_late_p99": "upstream late p99, ms",
    }  # fmt: skip
    show(rows, "The pace that was kept", pace)
