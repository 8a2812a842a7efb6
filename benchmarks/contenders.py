"""The gateways under test: how each is started on its core, asked, and watched from outside (/proc)."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
BENCH_DIR = HERE.parent / ".bench"
PORT, MOCK_PORT, PACED_PORT = 19001, 19002, 19003
"""Of the contender; of the canned upstream; of the paced one."""
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
POLICY = """
version: 1
providers:
  mock: {{base_url: "http://127.0.0.1:{upstream}/v1", timeout: 30s, retries: 1}}
models:
  mock: {{provider: mock, model: mock, context: 256000, max_output: 4000,
         price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: mock, model: dear, context: 256000, max_output: 4000,
         price: {{input: $2.50/Mtok, output: $10/Mtok}}}}
{signals}
routes:
  - name: auto
    when: {{model: auto}}
    objective: cheapest
    {rule}
    candidates: [mock, dear]
    on_failure: [dear]
limits:
  - {{key: "*", budget: $100000/month, rate: 60000000/min}}
"""
PROBE = "signals: {difficulty: {probe: default, heads: {mock: weak, dear: strong}, timeout: 10s}}"
GAP = 'subject_to: {p_success_gap: "<= 0.20"}'


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    key: str
    home: Path | None = None

    def stop(self) -> None:
        """In order, as its operator would: what it has to write down is written."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclass
class Contender:
    """One gateway under test, and how it is asked."""

    name: str
    start: Callable[[Path, int], Running]
    """Of a folder of its own and the upstream's port; returns when it serves."""
    env: dict[str, str] = field(default_factory=dict)
    """For load.lua."""
    streams_per_s: float = 200.0
    """Offered, of the paced streams."""


def pinned(core: str | None, command: list[str], **options: object) -> "subprocess.Popen[bytes]":
    """`core` None: wherever the kernel likes."""
    on = ["taskset", "-c", core] if core is not None else []
    return subprocess.Popen([*on, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(port: int, path: str | None = None, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path is None:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            else:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
            return
        time.sleep(0.005)
    raise TimeoutError(f"nothing listens on port {port}")


def nginx(folder: Path, port: int, location: str, upstream: int = MOCK_PORT) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nginx.conf").write_text(
        f"""
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; client_body_buffer_size 64k;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {location} }} }}
}}
"""
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


@contextlib.contextmanager
def canned_upstream(folder: Path, core: str | None = LOAD_CORE) -> Iterator[None]:
    """One answer from nginx, for whoever asks."""
    location = f"default_type application/json; return 200 '{ANSWER}';"
    mock = Running(pinned(core, nginx(folder / "mock", MOCK_PORT, location)), "none")
    try:
        wait_for(MOCK_PORT)
        yield
    finally:
        mock.stop()


def start_nginx(folder: Path, upstream: int) -> Running:
    location = "proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off;"
    process = pinned(GATEWAY_CORE, nginx(folder, PORT, location, upstream))
    wait_for(PORT)
    return Running(process, "none")


def start_aiohttp(folder: Path, upstream: int) -> Running:
    script = str(HERE / "aiohttp_proxy.py")
    process = pinned(GATEWAY_CORE, [sys.executable, script, str(PORT), f"http://127.0.0.1:{upstream}/v1"])
    wait_for(PORT)
    return Running(process, "none")


def start_litellm(folder: Path, upstream: int) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "litellm.yaml"
    key = "sk-bench-litellm"
    config.write_text(
        f"model_list: [{{model_name: mock, litellm_params: {{model: openai/mock, api_key: none, "
        f"api_base: 'http://127.0.0.1:{upstream}/v1'}}}}]\ngeneral_settings: {{master_key: {key}}}\n"
    )
    env = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    program = str(BENCH_DIR / "litellm/bin/litellm")
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(PORT)]
    process = pinned(GATEWAY_CORE, command, env=env, cwd=folder)
    wait_for(PORT, "/health/liveliness")
    return Running(process, key)


def start_leadline(folder: Path, upstream: int, *options: str, core: str | None = GATEWAY_CORE, **env: str) -> Running:
    """With a policy that needs no engine."""
    return _serve(folder, POLICY.format(upstream=upstream, signals="", rule=""), core, *options, **env)


def start_leadline_probing(folder: Path, upstream: int) -> Running:
    """With the default probe, whose engine process is moved to the load's core."""
    running = _serve(folder, POLICY.format(upstream=upstream, signals=PROBE, rule=GAP), GATEWAY_CORE)
    time.sleep(6)  # the engine loads beside; it must not be measured
    for child in children(running.process.pid):
        subprocess.run(["taskset", "-apc", LOAD_CORE, str(child)], stdout=subprocess.DEVNULL, check=False)
    return running


def _serve(folder: Path, policy: str, core: str | None, *options: str, **env: str) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    file, home = folder / "policy.yaml", folder / "home"
    file.write_text(policy)
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(PORT), "--policy", str(file), *options]
    whole = {**os.environ, "LEADLINE_HOME": str(home), **env}
    process = pinned(core, command, env=whole, start_new_session=True)
    wait_for(PORT, "/health/readiness")
    return Running(process, (home / "key").read_text(), home)


CONTENDERS = [
    Contender("nginx", start_nginx),
    Contender("aiohttp-proxy", start_aiohttp),
    Contender("litellm", start_litellm, streams_per_s=5.0),
    # every prompt new: cache look-up, miss, store; the caller names the model
    Contender("leadline", start_leadline, {"BENCH_UNIQUE": "1"}),
    # routed by the probe; one prompt, known to the probe's memory; the answer cache looked over, not used
    Contender("leadline-auto", start_leadline_probing, {"BENCH_MODEL": "auto", "BENCH_CACHE_CONTROL": "no-cache"}),
    # routed by the probe; every prompt new, so the encoder in the engine process sets the pace
    Contender("leadline-auto-new", start_leadline_probing, {"BENCH_MODEL": "auto", "BENCH_UNIQUE": "1"}),
    # answered from the exact cache
    Contender("leadline-cached", start_leadline),
]


def available(contender: Contender) -> bool:
    if contender.name == "litellm" and not (BENCH_DIR / "litellm/bin/litellm").exists():
        print(f"litellm is left out: install it with `python -m venv {BENCH_DIR}/litellm` and its pip, litellm[proxy]")
        return False
    return shutil.which("nginx") is not None or contender.name != "nginx"


def litellm_version() -> str:
    found = sorted((BENCH_DIR / "litellm/lib").glob("python*/site-packages/litellm-*.dist-info"))
    return found[-1].name.removeprefix("litellm-").removesuffix(".dist-info") if found else "not installed"


# /proc -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def serving(pid: int) -> list[int]:
    """The processes that requests go through: nginx's and Leadline's workers, else the process itself."""
    workers = [child for child in children(pid) if "gateway.worker" in _words(child) or "nginx" in _words(child)[0]]
    return workers or [pid]


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def cpu_s(pid: int) -> float:
    """User and system time of the serving processes (Leadline's engine is another process, another core)."""
    ticks = 0
    for each in serving(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def rss_mb(pid: int) -> float:
    """Resident memory of the serving processes, each on average, in MB (10^6)."""
    found = []
    for each in serving(pid):
        status = Path(f"/proc/{each}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        found.append(int(line.split()[1]) * 1024 / 1e6)
    return sum(found) / len(found)
