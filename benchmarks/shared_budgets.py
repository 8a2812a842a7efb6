"""What shared budgets cost: two worker processes, 32 calls at a time each, on a PostgreSQL of its own database.

    DATABASE_URL=postgresql://… python -m benchmarks.shared_budgets [SECONDS]

Each call finds its budget, reserves, settles and is booked with its ledger row. One line per worker and per kind of
budget: calls per second, CPU per call of the worker, and how long `find` and `reserve` took.
"""

import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine

from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_budgets import SharedBudgets, connect_budgets
from gateway.ledger.journal import Journal
from gateway.ledger.records import RequestRecord
from gateway.ledger.store import LedgerStore, connect
from gateway.settings import Settings

WORKERS = 2
CONCURRENT = 32


async def drive(budgets: SharedBudgets, ledger: LedgerStore, name: str, kind: str, seconds: float) -> str:
    """Calls until the time is over."""
    waits: list[float] = []
    ends = time.monotonic() + seconds
    serial = 0

    async def caller(number: int) -> None:
        nonlocal serial
        key = "one" if kind == "one budget" else f"{name}-{number}"
        limits = [] if kind == "no budget" else [BudgetLimit(f"key:{key}", "total", 10**15, f"key:{key}")]
        while time.monotonic() < ends:
            serial += 1
            now_ms = time.time_ns() // 1_000_000
            record = RequestRecord(f"{name}-{kind}-{serial}"[:40], now_ms, "t", key, "chat", False, "m")
            record.outcome, record.cost_nanousd = "ok", 500
            started = time.perf_counter()
            account = await budgets.find(limits, now_ms, record.id)
            hold = await account.reserve(1000)
            waits.append(time.perf_counter() - started)
            ledger.journal.opened(record)
            await asyncio.sleep(0)
            hold.settle(500)
            ledger.close_request(record, [])

    cpu, began = time.process_time(), time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(CONCURRENT)))
    await ledger.flush(timeout_s=60)
    cpu, wall = time.process_time() - cpu, time.monotonic() - began
    waits.sort()
    return (
        f"{name} {kind:<16} {serial / wall:7.0f} calls/s  {cpu / serial * 1e6:6.0f} us CPU/call  "
        f"wait p50 {waits[len(waits) // 2] * 1e3:6.2f} ms  p99 {waits[len(waits) * 99 // 100] * 1e3:6.2f} ms"
    )


async def work(url: str, name: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as home:
        budgets = SharedBudgets(connect_budgets(url))
        ledger = LedgerStore(create_engine(url), Journal(Path(home) / "journal"), booking=budgets)
        ledger.start()
        budgets.start()
        for kind in ("no budget", "one budget", "budgets apart"):
            sys.stdout.write(await drive(budgets, ledger, name, kind, seconds) + "\n")
        await ledger.stop()


def main() -> None:
    url = Settings.from_env(dict(os.environ)).database_url
    connect(url).dispose()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    started = [
        multiprocessing.get_context("spawn").Process(target=_run, args=(url, f"w{number}", seconds))
        for number in range(WORKERS)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()


def _run(url: str, name: str, seconds: float) -> None:
    asyncio.run(work(url, name, seconds))


if __name__ == "__main__":
    main()
