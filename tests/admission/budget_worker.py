"""One worker process of the budget races: real shared budgets, a real journal, a real ledger; no HTTP.

    python -m tests.admission.budget_worker DATABASE_URL HOME WORKER DEAD_AFTER_S

It reads one JSON order per line from stdin and answers each with one JSON line on stdout.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import create_engine

from gateway.admission import budget_writer, shared_budgets
from gateway.admission.limits import BudgetLimit
from gateway.admission.shared_budgets import SharedBudgets, connect_budgets
from gateway.errors import BudgetExceeded
from gateway.ledger.journal import Journal
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import NO_USAGE
from gateway.ledger.store import LedgerStore


@dataclass(frozen=True)
class Order:
    """Calls to make at the same time: each reserves `amount`, and costs between `least` and `amount`."""

    key: str
    calls: int
    amount: int
    least: int
    limits: list[list[Any]]
    """[scope, nano-dollars or null, given nano-dollars or null] of each call's budgets."""
    paths: list[str]
    """Runs of the calls, in turn; empty: none."""
    unbounded: int = 0
    """Calls of the same key without any budget that close just before."""
    linger_s: float = 0.0
    """How long a call runs."""


class Worker:
    def __init__(self, url: str, home: Path, name: str, dead_after_s: float) -> None:
        self.name = name
        self.budgets = SharedBudgets(connect_budgets(url), dead_after_s=dead_after_s)
        self.ledger = LedgerStore(create_engine(url), Journal(home / "journal"), booking=self.budgets)
        self.serial = 0
        self.random = random.Random(name)

    async def start(self) -> None:
        self.ledger.replay()
        self.ledger.start()
        self.budgets.start()

    async def stop(self) -> None:
        await self.ledger.stop()

    def record(self, key: str, path: str | None) -> RequestRecord:
        self.serial += 1
        now_ms = time.time_ns() // 1_000_000
        request_id = f"{self.name}-{time.time_ns():x}-{self.serial}"
        return RequestRecord(request_id, now_ms, "t", key, "chat.completions", False, "m", scope=path)

    async def call(self, order: Order, index: int) -> int | None:
        """What one call cost; None when its budget refused it."""
        path = order.paths[index % len(order.paths)] if order.paths else None
        record = self.record(order.key, path)
        limits = [
            BudgetLimit(scope, "total", nanousd, scope, (), given)
            for scope, nanousd, given in order.limits
            if not scope.startswith("scope:") or f"scope:{order.key}:{path}/".startswith(f"{scope}/")
        ]
        account = await self.budgets.find(limits, record.created_at_ms, record.id)
        self.ledger.journal.opened(record)
        attempts: list[AttemptRecord] = []
        cost: int | None = None
        try:
            hold = await account.reserve(order.amount)
        except BudgetExceeded:
            pass
        else:
            attempt = AttemptRecord(f"{record.id}-0", record.id, 0, "m", "p", record.created_at_ms)
            attempt.bill(NO_USAGE, order.amount)
            self.ledger.journal.dispatched(attempt)
            attempts.append(attempt)
            await asyncio.sleep(order.linger_s)
            cost = self.random.randint(order.least, order.amount)
            attempt.bill(NO_USAGE, cost)
            hold.settle(cost)
        self.close(record, attempts)
        return cost

    def close(self, record: RequestRecord, attempts: list[AttemptRecord]) -> None:
        record.outcome, record.http_status = "ok", 200
        record.total(attempts)
        self.ledger.close_request(record, attempts)

    async def run(self, order: Order) -> dict[str, Any]:
        for _ in range(order.unbounded):
            record = self.record(order.key, None)
            self.ledger.journal.opened(record)
            attempt = AttemptRecord(f"{record.id}-0", record.id, 0, "m", "p", record.created_at_ms)
            attempt.bill(NO_USAGE, 1)
            self.close(record, [attempt])
        costs = await asyncio.gather(*(self.call(order, i) for i in range(order.calls)))
        await self.ledger.flush(timeout_s=30)
        await asyncio.sleep(0)
        await self.budgets.find(
            [BudgetLimit("scope:none:none", "total", None, "")], 0, "last"
        )  # corrections are in SQL
        return {"costs": [cost for cost in costs if cost is not None], "statistics": self.budgets.statistics()}


async def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    # However slow this machine is now, the database's answer is waited for, and the other workers'.
    shared_budgets.WAIT_S = 40.0  # type: ignore[attr-defined]
    budget_writer.RECALL_S = 20.0
    url, home, name, dead_after_s = sys.argv[1:]
    worker = Worker(url, Path(home), name, float(dead_after_s))
    await worker.start()
    sys.stdout.write(json.dumps({"ready": name}) + "\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(await worker.run(Order(**json.loads(line)))) + "\n")
        sys.stdout.flush()
    await worker.stop()


if __name__ == "__main__":
    asyncio.run(main())
