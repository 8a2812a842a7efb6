"""The demo's processes: the recorded upstream and a real `leadline serve`, each stopped by leaving its `with`."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
LEADLINE = Path(sys.executable).with_name("leadline")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
_BANNER_URL = re.compile(r"^  URL +(http://\S+)/v1$", re.MULTILINE)

POLICY = Template("""\
# Written by `make demo`. The prices are those of 2024; the upstream keeps its own copy of them.
version: 1

providers:
  home:     {engine: embedded}
  recorded: {base_url: "$upstream", timeout: 30s, retries: 0}

models:
  local: {provider: home, model: bundled/base, context: 1024}
  weak:
    provider: recorded
    model: mixtral-8x7b
    context: 32768
    max_output: 4096
    price: {input: $$0.60/Mtok, output: $$0.60/Mtok}
  strong:
    provider: recorded
    model: gpt-4-1106-preview
    context: 128000
    max_output: 4096
    price: {input: $$10/Mtok, output: $$30/Mtok}

signals:
  difficulty: {probe: "$probe", heads: {$heads}, timeout: 10s}

routes:
  - name: auto
    when: {model: auto}
    candidates: [$candidates]       # from the weakest to the strongest
    objective: cheapest
    subject_to: {p_success_gap: "<= $gap"}
""")


def write_policy(path: Path, *, upstream: str, probe: str, candidates: tuple[str, ...], gap: float) -> Path:
    """A policy that takes the cheapest of `candidates` within `gap` of the best one's chance of success."""
    heads = ", ".join(f"{name}: {name}" for name in candidates)
    text = POLICY.substitute(
        upstream=upstream, probe=probe, heads=heads, candidates=", ".join(candidates), gap=f"{gap:.4f}"
    )
    path.write_text(text, encoding="utf-8")
    return path


class DemoError(RuntimeError):
    """The demo cannot go on; the message says what to do about it."""


@contextlib.contextmanager
def recorded_upstream(data: Path, truth: Path) -> Iterator[str]:
    """The base URL of a recorded upstream in a process of its own."""
    command = [sys.executable, str(HERE / "recorded_upstream.py"), str(data), str(truth)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with _stopped(process):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise DemoError("the recorded upstream did not start; its words are above")
        yield url


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway. `base_url` ends in /v1."""

    base_url: str
    key: str
    home: Path

    def api(self, path: str, body: Any = None) -> Any:
        """One call of the gateway's own API."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        url = self.base_url.removesuffix("/v1") + path
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=60) as response:
            return json.load(response)


@contextlib.contextmanager
def gateway(home: Path, policy: Path) -> Iterator[Gateway]:
    """`leadline serve` on a free port with its state in `home`, ready with engine and probe."""
    ours = ("DATABASE_URL", "REDIS_URL", "OPENAI_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in ours} | {"LEADLINE_HOME": str(home)}
    log = home / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [LEADLINE, "serve", "--port", "0", "--policy", policy], stdout=file, stderr=subprocess.STDOUT, env=env
        )
    with _stopped(process):
        url = _when_ready(process, log)
        yield Gateway(f"{url}/v1", (home / "key").read_text().strip(), home)


def _when_ready(process: subprocess.Popen[Any], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        found = _BANNER_URL.search(log.read_text(encoding="utf-8"))
        if found and _all_models_up(found[1]):
            return found[1]
        time.sleep(0.05)
    raise DemoError(f"the gateway did not become ready:\n{log.read_text(encoding='utf-8')[-2000:]}")


def _all_models_up(url: str) -> bool:
    return Gateway(f"{url}/v1", "", Path()).api("/health/readiness")["unavailable"] == {}


@contextlib.contextmanager
def _stopped(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ask the process to end when the block does; insist where it does not listen."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def fit_probe(table: Path, out: Path) -> None:
    """`leadline probe fit`, as a user with labels of their own would run it."""
    command = [LEADLINE, "probe", "fit", table, "--prompt", "prompt", "--out", out]
    heads = ["--head", "weak=mixtral_8x7b_correct", "--head", "strong=gpt4_1106_correct"]
    done = subprocess.run([*command, *heads], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"`leadline probe fit` failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
