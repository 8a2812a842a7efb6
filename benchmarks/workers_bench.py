"""Two workers on two cores, over one: both with shared limits (Redis, PostgreSQL), nothing pinned.

The load generator, the upstream, Redis and PostgreSQL share the two cores with the workers, so the raw ratio says what
such a machine does in all, not what a second worker brings. Requests per second of the workers' own CPU say that: what
one worker does with a second of CPU, and each of two does.
"""

import contextlib
import tempfile
import time
from pathlib import Path

from contenders import MOCK_PORT, PORT, canned_upstream, cpu_s, rss_mb, serving, start_leadline
from measured import Measured, show
from requests_bench import wrk
from results_file import Row
from services import database, postgres_server, redis_server

CONNECTIONS = 64
NOTE = (
    "Load generator, upstream, Redis and PostgreSQL share the two cores with the workers: the raw ratio is bounded by "
    "that. Two workers with cores of their own: 2 x the ratio per CPU second."
)


def measure(seconds: float, seed: int, into: Measured) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leadline-bench-")))
        stack.enter_context(canned_upstream(folder, core=None))
        redis, postgres = stack.enter_context(redis_server()), stack.enter_context(postgres_server())
        for count in (1, 2):
            with database(postgres) as url:
                _measure(count, folder / str(count), {"REDIS_URL": redis, "DATABASE_URL": url}, seconds, seed, into)
    raw = [into.last(_name(count), "requests_per_s") or 0 for count in (1, 2)]
    per_cpu = [into.last(_name(count), "requests_per_cpu_s") or 0 for count in (1, 2)]
    into.add(_name(2), "requests_per_s_over_one", raw[1] / raw[0], "ratio")
    into.add(_name(2), "requests_per_cpu_s_over_one", per_cpu[1] / per_cpu[0], "ratio")


def _name(count: int) -> str:
    return f"leadline, {count} worker{'s' * (count > 1)}, shared"


def _measure(count: int, folder: Path, env: dict[str, str], seconds: float, seed: int, into: Measured) -> None:
    running = start_leadline(folder, MOCK_PORT, "--workers", str(count), core=None, **env)
    pid = running.process.pid
    try:
        deadline = time.monotonic() + 30
        while len(serving(pid)) < count or (count > 1 and pid in serving(pid)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} workers did not start")
            time.sleep(0.05)
        runs = [wrk(PORT, CONNECTIONS, 1, {"BENCH_UNIQUE": "1"}, running.key, seed, core=None)]
        before = cpu_s(pid)
        runs.append(wrk(PORT, CONNECTIONS, seconds, {"BENCH_UNIQUE": "1"}, running.key, seed + 1, core=None))
        used_s = cpu_s(pid) - before
        memory = rss_mb(pid)
    finally:
        running.stop()
    check_ledger(env["DATABASE_URL"], sum(run["requests"] for run in runs))
    busy, name = runs[-1], _name(count)
    into.add(name, "requests_per_s", busy["requests"] * 1e6 / busy["duration_us"], "1/s")
    into.add(name, "requests_per_cpu_s", busy["requests"] / used_s, "1/s")
    into.add(name, "cpu_of_workers", used_s * 1e6 / busy["duration_us"], "cores")
    into.add(name, "rss_per_worker", memory, "MB")
    print(f"  {name}: {busy['requests'] * 1e6 / busy['duration_us']:,.0f}/s", flush=True)


def check_ledger(url: str, requests: int) -> None:
    """Raises unless PostgreSQL holds a row for each request, up to those in flight when wrk stopped."""
    import psycopg

    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*), count(*) FILTER (WHERE outcome = 'ok') FROM request").fetchone()
    assert found is not None
    rows, ok = found
    if not requests <= ok <= rows <= requests + 2 * CONNECTIONS:
        raise RuntimeError(f"{requests} requests answered, {rows} rows in the ledger, {ok} of them ok")


def tables(rows: list[Row]) -> None:
    columns = {
        "requests_per_s": "requests/s, c=64", "requests_per_cpu_s": "requests per CPU second",
        "cpu_of_workers": "cores used by workers", "requests_per_s_over_one": "× one worker, raw",
        "requests_per_cpu_s_over_one": "× one worker, per CPU second", "rss_per_worker": "MB per worker",
    }  # fmt: skip
    show([row for row in rows if row.name.startswith("leadline, ")], "Two cores, nothing pinned", columns, NOTE)
