"""From `leadline serve` to the first answer of `/health/readiness`: on an empty state folder, and on its own again."""

import tempfile
import time
from pathlib import Path

from contenders import MOCK_PORT, start_leadline
from measured import Measured, show
from results_file import Row

STARTS = 3


def measure(into: Measured) -> None:
    """A policy of remote models only: no engine, no torch."""
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder:
            for metric in ("start_empty", "start_again"):
                began = time.perf_counter()
                running = start_leadline(Path(folder), MOCK_PORT)
                into.add("leadline", metric, time.perf_counter() - began, "s")
                running.stop()
    print(f"  leadline: {into.last('leadline', 'start_again') or 0:.2f} s", flush=True)


def tables(rows: list[Row]) -> None:
    columns = {"start_empty": "s, empty state folder", "start_again": "s, its own again"}
    show(rows, "Start to readiness, remote models only", columns)
