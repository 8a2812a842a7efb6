"""T3: eight worker processes race for the same budgets on a real PostgreSQL; one of them is killed in the middle."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from gateway.ledger import budget_rows
from gateway.ledger.store import connect
from gateway.settings import Settings
from tests.admission.books import snapshot
from tests.conftest import Size

WORKERS = 8
CALLS = 64
BUDGETS, SOAK_BUDGETS = 20, 200
AMOUNT = 1_000


class WorkerProcess:
    def __init__(self, url: str, home: Path, name: str, dead_after_s: float) -> None:
        self.arguments = [url, str(home / name), name, str(dead_after_s)]
        self.spawn()

    def spawn(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.admission.budget_worker", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def stop(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(30)
        self.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


StartWorkers = Callable[[int, float], list[WorkerProcess]]


@pytest.fixture
def url(postgres_url: str) -> str:
    return Settings.from_env({"DATABASE_URL": postgres_url}).database_url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def start_workers(url: str, engine: Engine, tmp_path: Path) -> Iterator[StartWorkers]:
    started: list[WorkerProcess] = []

    def start(count: int, dead_after_s: float) -> list[WorkerProcess]:
        started.extend(WorkerProcess(url, tmp_path, f"w{i}", dead_after_s) for i in range(count))
        for worker in started:
            assert worker.read() == {"ready": worker.arguments[2]}
        return started

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.kill()


def race(workers: list[WorkerProcess], order: dict[str, Any]) -> list[int]:
    """The costs of all calls that were let through."""
    for worker in workers:
        worker.send(order)
    with ThreadPoolExecutor(len(workers)) as pool:
        answers = list(pool.map(WorkerProcess.read, workers))
    assert all(answer["statistics"] == {"open": 0, "waiting": 0} for answer in answers)
    return [cost for answer in answers for cost in answer["costs"]]


def order(key: str, limits: list[list[Any]], **more: Any) -> dict[str, Any]:
    return {
        "key": key, "calls": CALLS, "amount": AMOUNT, "least": AMOUNT, "limits": limits, "paths": [], **more,
    }  # fmt: skip


def books(engine: Engine) -> dict[str, tuple[int, int]]:
    """(spent, reserved) of each budget; fails unless every counter equals the ledger and the holds."""
    with snapshot(engine) as connection:
        assert budget_rows.integrity(connection) == []
        found = connection.execute(text("SELECT scope, spent_nanousd, reserved_nanousd FROM budget"))
        return {row[0]: (row[1], row[2]) for row in found}


def idle(engine: Engine) -> dict[str, tuple[int, int]]:
    """The books, once the workers have given back the slices that they do not use."""
    deadline = time.monotonic() + 60
    while True:
        found = books(engine)
        if not any(reserved for _, reserved in found.values()):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_eight_workers_never_overspend_nor_refuse_what_fits(
    engine: Engine, start_workers: StartWorkers, size: Size
) -> None:
    workers = start_workers(WORKERS, 30.0)
    for number in range(size(BUDGETS, SOAK_BUDGETS)):
        key, seeded, unbounded = f"k{number}", number * 17 % 60, number % 3
        before = seeded + unbounded * WORKERS
        fits = 1 + number * 29 % 400
        with engine.begin() as connection:
            connection.execute(_LEDGER_ROW, {"id": f"old-{key}", "key": key, "cost": seeded})
        limit = before + fits * AMOUNT + number % AMOUNT
        varied = number % 2 == 1
        one = order(key, [[f"key:{key}", limit, None]], least=1 if varied else AMOUNT)
        costs = race(workers, {**one, "unbounded": unbounded})
        if not varied:
            assert len(costs) == fits, "as many as fit: no more, and nobody refused while one still fitted"
        else:
            assert len(costs) >= fits
            while len(costs) < 4 * CALLS * WORKERS:  # what is left when all have ended is there for the next
                more = race(workers, {**one, "calls": 1})
                costs += more
                if not more:
                    break
        spent, reserved = books(engine)[f"key:{key}"]
        assert spent == before + sum(costs) <= limit
        assert reserved == 0
        assert not varied or limit - spent < AMOUNT or len(costs) >= 4 * CALLS * WORKERS
    assert [worker.stop() for worker in workers] == [0] * WORKERS


@pytest.mark.timeout(300)
def test_a_tree_of_runs_races_for_its_roots_budget(engine: Engine, start_workers: StartWorkers) -> None:
    workers = start_workers(WORKERS, 30.0)
    leaves = [f"run/a{i}/b{j}" for i in range(4) for j in range(2)]
    limits: list[list[Any]] = [["key:k", 10**9, None], ["scope:k:run", 300 * AMOUNT, None]]
    limits += [[f"scope:k:run/a{i}", None, None if i else 20 * AMOUNT] for i in range(4)]
    limits += [[f"scope:k:{leaf}", None, 7 * AMOUNT if leaf.endswith("a1/b1") else None] for leaf in leaves]
    costs = race(workers, order("k", limits, paths=leaves))
    assert len(costs) == 20 + 7 + 64 + 128 + 128 - max(0, 20 + 7 + 64 + 128 + 128 - 300)
    found = idle(engine)
    assert found["key:k"] == found["scope:k:run"] == (300 * AMOUNT, 0)
    assert found["scope:k:run/a0"][0] <= 20 * AMOUNT
    assert found["scope:k:run/a1/b1"][0] <= 7 * AMOUNT
    assert set(found) == {"key:k", "scope:k:run", "scope:k:run/a0", "scope:k:run/a1/b1"}
    assert [worker.stop() for worker in workers] == [0] * WORKERS


@pytest.mark.timeout(300)
def test_slices_of_eight_workers_never_overspend_nor_refuse_what_fits(
    engine: Engine, start_workers: StartWorkers
) -> None:
    """As long as much is left each worker reserves in memory; the end is exact to the nano-dollar all the same."""
    workers = start_workers(WORKERS, 30.0)
    fits = 2_000
    limit = fits * AMOUNT + AMOUNT - 1
    one = order("k", [["key:k", limit, None]], linger_s=0.001)
    costs: list[int] = []
    kept = 0
    while len(costs) < fits:
        costs += race(workers, one)
        kept += books(engine)["key:k"][1]
        assert sum(books(engine)["key:k"]) <= limit
    assert kept, "no slice was kept: this test shows nothing"
    assert len(costs) == fits, "nobody is refused because another one keeps what it does not use"
    assert race(workers, one) == []
    assert books(engine)["key:k"] == (fits * AMOUNT, 0)
    assert [worker.stop() for worker in workers] == [0] * WORKERS


@pytest.mark.timeout(300)
def test_what_a_killed_worker_held_is_spent_until_its_journal_says_otherwise(
    engine: Engine, start_workers: StartWorkers
) -> None:
    workers = start_workers(3, 3.0)
    victim, *others = workers
    limit = [["key:k", 200 * AMOUNT, None]]
    victim.send(order("k", limit, linger_s=600.0))
    deadline = time.monotonic() + 60
    while books(engine).get("key:k", (0, 0))[1] < CALLS * AMOUNT:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim.kill()
    held = books(engine)["key:k"][1]
    spare = held - CALLS * AMOUNT  # of a slice, if it had one: it may have spent that as well
    costs = race(others, order("k", limit))
    assert len(costs) == min(2 * CALLS, 200 - held // AMOUNT)
    while books(engine)["key:k"] != (len(costs) * AMOUNT + held, 0):  # moved from reserved to spent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(race(others, order("k", limit))) == 200 - len(costs) - held // AMOUNT
    victim.spawn()
    assert victim.read() == {"ready": "w0"}
    assert books(engine)["key:k"] == (200 * AMOUNT - spare, 0), "billed at the most it can have cost, once"
    with engine.connect() as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM worker_hold WHERE reclaimed_nanousd > 0")).scalar() == 0
        interrupted = connection.execute(text("SELECT COUNT(*) FROM request WHERE outcome = 'interrupted'")).scalar()
    assert interrupted == CALLS
    assert len(race(workers, order("k", limit))) == spare // AMOUNT
    assert idle(engine)["key:k"] == (200 * AMOUNT, 0)


@pytest.mark.timeout(300)
def test_the_slice_of_a_killed_worker_comes_back_with_its_journal(engine: Engine, start_workers: StartWorkers) -> None:
    victim, other = start_workers(2, 3.0)
    limit = [["key:k", 10_000 * AMOUNT, None]]
    victim.send(order("k", limit, linger_s=600.0))
    deadline = time.monotonic() + 60
    while (held := books(engine).get("key:k", (0, 0))[1]) <= CALLS * AMOUNT:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim.kill()
    while books(engine)["key:k"] != (held, 0):  # it may have spent its slice as well
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim.spawn()
    assert victim.read() == {"ready": "w0"}
    assert books(engine)["key:k"] == (CALLS * AMOUNT, 0), "its calls at the most they can have cost, and no slice"
    assert len(race([victim, other], order("k", limit))) == 2 * CALLS
    assert idle(engine)["key:k"] == (3 * CALLS * AMOUNT, 0)


_LEDGER_ROW = text(
    "INSERT INTO request (id, created_at_ms, tenant, key_id, endpoint, stream, model_requested, route, policy_version,"
    " outcome, http_status, cache, attempts, input_tokens, cached_input_tokens, cache_write_tokens, output_tokens,"
    " reasoning_tokens, cost_nanousd, cost_estimated, reserved_nanousd, duration_us, overhead_us)"
    " VALUES (:id, 1, 't', :key, 'chat.completions', false, 'm', '', '', 'ok', 200, 'off', 1, 0, 0, 0, 0, 0, :cost,"
    " false, 0, 0, 0)"
)
