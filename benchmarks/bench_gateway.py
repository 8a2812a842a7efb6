"""Requests per second of one core and added latency, beside nginx, a bare aiohttp proxy and LiteLLM, in one run.

    python benchmarks/bench_gateway.py [--rounds 3] [--seconds 5] [--only leadline-named,nginx]

The load generator (wrk) and the mock upstream (nginx, a canned answer) share the first core, the gateway has the
second to itself. Rounds are interleaved: each contender runs once, then the next round starts. Everything that a
Leadline request does is on the path: key, budget, rate, exact cache (missed, then filled), policy, decision, journal,
SQL ledger, metrics. After each run the ledger must hold exactly one row for every request that the load generator
counted (up to those in flight when it stopped). Medians over rounds, with the lowest and highest.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from results_file import Row, write
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BENCH_DIR = HERE.parent / ".bench"
MOCK_PORT, PORT = 19001, 19002
LOAD_CORE, GATEWAY_CORE = "0", "1"
TICKS = os.sysconf("SC_CLK_TCK")
ANSWER = json.dumps(
    {
        "id": "chatcmpl-mock", "object": "chat.completion", "created": 1, "model": "mock",
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": {"role": "assistant",
            "content": "Saturn, Jupiter, Uranus and Neptune have rings of ice, dust and rock. " * 4}}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 60, "total_tokens": 100},
    }
)  # fmt: skip
POLICY = f"""
version: 1
providers:
  mock: {{base_url: "http://127.0.0.1:{MOCK_PORT}/v1", timeout: 30s, retries: 1}}
models:
  mock: {{provider: mock, model: mock, context: 128000, max_output: 4000,
         price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: mock, model: dear, context: 128000, max_output: 4000,
         price: {{input: $2.50/Mtok, output: $10/Mtok}}}}
signals:
  difficulty: {{probe: default, heads: {{mock: weak, dear: strong}}, timeout: 10s}}
routes:
  - name: auto
    when: {{model: auto}}
    objective: cheapest
    subject_to: {{p_success_gap: "<= 0.20"}}
    candidates: [mock, dear]
    on_failure: [dear]
limits:
  - {{key: "*", budget: $100000/month, rate: 60000000/min}}
"""


@dataclass
class Contender:
    """One gateway under test, and how it is asked."""

    name: str
    start: Callable[[Path], "Running"]
    env: dict[str, str] = field(default_factory=dict)
    ledger: bool = False


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    key: str
    home: Path | None = None


@dataclass
class Sample:
    rps: float
    cpu_ms: float
    p50_us: float
    p50_alone_us: float


def pinned(core: str, command: list[str], **options: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["taskset", "-c", core, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )  # type: ignore[call-overload,no-any-return]


def nginx(folder: Path, port: int, location: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nginx.conf").write_text(
        f"""
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; client_body_buffer_size 64k;
  upstream mock {{ server 127.0.0.1:{MOCK_PORT}; keepalive 512; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {location} }} }}
}}
"""
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def wait_for(port: int, path: str | None = None, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path is None:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            else:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


def start_nginx(folder: Path) -> Running:
    location = "proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection '';"
    process = pinned(GATEWAY_CORE, nginx(folder, PORT, location))
    wait_for(PORT)
    return Running(process, "none")


def start_aiohttp(folder: Path) -> Running:
    script = str(HERE / "aiohttp_proxy.py")
    process = pinned(GATEWAY_CORE, [sys.executable, script, str(PORT), f"http://127.0.0.1:{MOCK_PORT}/v1"])
    wait_for(PORT)
    return Running(process, "none")


def start_litellm(folder: Path) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "litellm.yaml"
    key = "sk-bench-litellm"
    config.write_text(
        f"model_list: [{{model_name: mock, litellm_params: {{model: openai/mock, api_key: none, "
        f"api_base: 'http://127.0.0.1:{MOCK_PORT}/v1'}}}}]\ngeneral_settings: {{master_key: {key}}}\n"
    )
    env = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [
        str(BENCH_DIR / "litellm/bin/litellm"),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(PORT),
    ]
    process = pinned(GATEWAY_CORE, command, env=env, cwd=folder)
    wait_for(PORT, "/health/liveliness")
    return Running(process, key)


def start_leadline(folder: Path) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    env = {**os.environ, "LEADLINE_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(PORT), "--policy", str(policy)]
    process = pinned(GATEWAY_CORE, command, env=env, start_new_session=True)
    wait_for(PORT, "/health/readiness")
    key = (folder / "home" / "key").read_text()
    time.sleep(6)  # the engine loads beside; it must not be measured
    for child in children(process.pid):
        subprocess.run(["taskset", "-apc", LOAD_CORE, str(child)], stdout=subprocess.DEVNULL, check=False)
    return Running(process, key, folder / "home")


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def cpu_ticks(pid: int) -> int:
    """User and system time of the gateway process itself (Leadline's engine is another process, another core)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    total = int(fields[11]) + int(fields[12])
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return total + (sum(cpu_ticks(child) for child in children(pid)) if name == "nginx" else 0)


def load(port: int, connections: int, seconds: float, env: dict[str, str], key: str, seed: int) -> dict[str, int]:
    out = subprocess.run(
        ["taskset", "-c", LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(HERE / "load.lua"),
         f"http://127.0.0.1:{port}/v1/chat/completions"],
        env={**os.environ, "BENCH_KEY": key, "BENCH_SEED": str(seed), **env},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    line = next(line for line in out.splitlines() if line.startswith("RESULT "))
    result: dict[str, int] = json.loads(line.removeprefix("RESULT "))
    if result["bad_status"] or result["socket_errors"]:
        raise RuntimeError(f"errors under load: {result}")
    return result


def measure(contender: Contender, seconds: float, seed: int) -> Sample:
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as name:
        running = contender.start(Path(name) / contender.name)
        try:
            warm = load(PORT, 16, 1, contender.env, running.key, seed)
            alone = load(PORT, 1, min(seconds, 3), contender.env, running.key, seed + 1)
            before = cpu_ticks(running.process.pid)
            busy = load(PORT, 64, seconds, contender.env, running.key, seed + 2)
            cpu_ms = (cpu_ticks(running.process.pid) - before) * 1000 / TICKS / busy["requests"]
        finally:
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(60)
        if contender.ledger and running.home is not None:
            check_ledger(running.home, sum(run["requests"] for run in (warm, alone, busy)))
    return Sample(busy["requests"] * 1e6 / busy["duration_us"], cpu_ms, busy["p50_us"], alone["p50_us"])


def check_ledger(home: Path, requests: int) -> None:
    """Raises unless every counted request has its row. Those in flight when wrk stopped have rows of their own."""
    with contextlib.closing(sqlite3.connect(home / "ledger.db")) as database:
        rows, ok = database.execute("SELECT count(*), sum(outcome = 'ok') FROM request").fetchone()
    in_flight = 16 + 1 + 64
    if not requests <= ok <= rows <= requests + in_flight:
        raise RuntimeError(f"{requests} requests answered, {rows} rows in the ledger, {ok} of them ok")


CONTENDERS = [
    Contender("nginx", start_nginx),
    Contender("aiohttp-proxy", start_aiohttp),
    Contender("litellm", start_litellm),
    # every prompt new: cache look-up, miss, store; the caller names the model
    Contender("leadline-named", start_leadline, {"BENCH_UNIQUE": "1"}, ledger=True),
    # routed by the probe; one prompt, known to the probe's memory; the answer cache looked over, not used
    Contender("leadline-auto", start_leadline, {"BENCH_MODEL": "auto", "BENCH_CACHE_CONTROL": "no-cache"}, ledger=True),
    # routed by the probe; every prompt new, so the encoder in the engine process sets the pace
    Contender("leadline-auto-new", start_leadline, {"BENCH_MODEL": "auto", "BENCH_UNIQUE": "1"}, ledger=True),
    # answered from the exact cache
    Contender("leadline-cached", start_leadline, {}, ledger=True),
]


@contextlib.contextmanager
def mock_upstream() -> Iterator[int]:
    """A canned answer from nginx; yields its own p50 in µs, which every contender's is compared with."""
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as name:
        location = f"default_type application/json; return 200 '{ANSWER}';"
        process = pinned(LOAD_CORE, nginx(Path(name) / "mock", MOCK_PORT, location))
        try:
            wait_for(MOCK_PORT)
            yield load(MOCK_PORT, 1, 2, {}, "none", 0)["p50_us"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def available(contender: Contender) -> bool:
    if contender.name == "litellm" and not (BENCH_DIR / "litellm/bin/litellm").exists():
        print(f"litellm is left out: install it with `python -m venv {BENCH_DIR}/litellm` and its pip, litellm[proxy]")
        return False
    return shutil.which("nginx") is not None or contender.name != "nginx"


def rows_of(samples: dict[str, list[Sample]], direct_us: float) -> list[Row]:
    def row(name: str, metric: str, values: list[float], unit: str) -> Row:
        return Row(
            name, metric, round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4), unit
        )

    rows = []
    for name, taken in samples.items():
        rows.append(row(name, "requests_per_s_c64", [s.rps for s in taken], "1/s"))
        rows.append(row(name, "cpu_per_request", [s.cpu_ms for s in taken], "ms"))
        rows.append(row(name, "added_p50_c1", [(s.p50_alone_us - direct_us) / 1000 for s in taken], "ms"))
        for rival in ("nginx", "aiohttp-proxy", "litellm"):
            if rival in samples:
                ratios = [s.rps / r.rps for s, r in zip(taken, samples[rival], strict=True)]
                rows.append(row(name, f"requests_per_s_over_{rival}", ratios, "ratio"))
    return rows


def show(rows: list[Row], samples: dict[str, list[Sample]], direct_us: float) -> None:
    table = Table(title=f"One core; median (lowest to highest); direct p50 {direct_us / 1000:.3f} ms")
    for heading in ("gateway", "requests/s, c=64", "CPU ms/request", "added p50, c=1, ms", "x LiteLLM", "x nginx"):
        table.add_column(heading, justify="left" if heading == "gateway" else "right")
    found = {(row.name, row.metric): row for row in rows}
    for name in samples:
        cells = [name]
        for metric in (
            "requests_per_s_c64", "cpu_per_request", "added_p50_c1",
            "requests_per_s_over_litellm", "requests_per_s_over_nginx",
        ):  # fmt: skip
            row = found.get((name, metric))
            cells.append("-" if row is None else cell(row))
        table.add_row(*cells)
    Console(width=150).print(table)


def cell(row: Row) -> str:
    form = ",.3g" if row.value < 1000 else ",.0f"
    return f"{row.value:{form}} ({row.low:{form}}–{row.high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    contenders = [c for c in CONTENDERS if (not only or c.name in only) and available(c)]
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    with mock_upstream() as direct_us:
        for round_number in range(arguments.rounds):
            for contender in contenders:
                sample = measure(contender, arguments.seconds, seed=round_number * 1000)
                samples[contender.name].append(sample)
                print(
                    f"round {round_number + 1}: {contender.name}: {sample.rps:,.0f}/s, {sample.cpu_ms:.3f} ms CPU",
                    flush=True,
                )
    rows = rows_of(samples, direct_us)
    show(rows, samples, direct_us)
    if not arguments.no_write:
        packages = ("leadline", "uvicorn", "uvloop", "aiohttp", "httptools", "msgspec", "sqlalchemy", "fastapi")
        print(write("gateway", "make bench-gateway", packages, rows, litellm=litellm_version()))


def litellm_version() -> str:
    found = sorted((BENCH_DIR / "litellm/lib").glob("python*/site-packages/litellm-*.dist-info"))
    return found[-1].name.removeprefix("litellm-").removesuffix(".dist-info") if found else "not installed"


if __name__ == "__main__":
    main()
