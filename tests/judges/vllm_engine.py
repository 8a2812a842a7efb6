"""The vLLM adapter before a real vLLM: `python -m tests.judges.vllm_engine VENV`. Exit status 1 if a check fails.

VENV is what scripts/install_vllm.sh made. The server runs the bundled model on the CPU; the gateway before it is a
process of its own. Checked: answers, streamed and not; cached tokens in the ledger; tenants kept apart by salts; the
load header; a caller who leaves ends the generation.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from gateway.upstream.engines import load_of_header
from tests.conftest import free_port, stop
from tests.faults.serving import Serving, serving

MODEL = Path(__file__).parents[2] / "local_engine" / "bundled" / "base"
START_S = 300
POLICY = """
version: 1
providers:
  gpu: {{server: vllm, base_url: "{url}", timeout: 60s, retries: 0, breaker: off}}
models:
  base: {{provider: gpu, model: base, context: 1024, max_output: 512,
         price: {{input: $1/Mtok, cached_input: $0.1/Mtok, output: $2/Mtok}}}}
routes: [{{name: auto, when: {{model: auto}}, use: [base], cache: off}}]
"""
LONG = "You are a careful calculator. " * 20


@contextmanager
def vllm(venv: Path, folder: Path) -> Iterator[str]:
    """A vLLM server with the bundled model; yields its base URL."""
    port = free_port()
    command = [
        str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "8",
        "--enable-prompt-tokens-details", "--enable-prefix-caching",
    ]  # fmt: skip
    env = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        until = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vLLM did not start:\n{(folder / 'vllm.log').read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _ask(url: str, headers: dict[str, str], body: bytes | None = None) -> tuple[bytes, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
        return response.read(), response.headers


def _running(url: str) -> float:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(
        float(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", text, re.M)
    )


def _messages(question: str) -> list[Any]:
    return [{"role": "system", "content": LONG}, {"role": "user", "content": question}]


def _other_key(gateway: Serving) -> str:
    body, _ = _ask(
        f"http://127.0.0.1:{gateway.port}/leadline/v1/admin/keys",
        {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"},
        json.dumps({"name": "other", "tenant": "elsewhere"}).encode(),
    )
    key: str = json.loads(body)["key"]
    return key


async def judge(gateway: Serving, url: str) -> dict[str, bool]:
    """What holds."""
    base = f"http://127.0.0.1:{gateway.port}/v1"
    mine = openai.AsyncOpenAI(base_url=base, api_key=gateway.key, max_retries=0)
    other = openai.AsyncOpenAI(base_url=base, api_key=_other_key(gateway), max_retries=0)

    async def cached(client: openai.AsyncOpenAI, question: str) -> int:
        answer = await client.chat.completions.create(model="base", messages=_messages(question), max_tokens=4)
        details = answer.usage.prompt_tokens_details if answer.usage else None
        return (details.cached_tokens or 0) if details else 0

    found = {}
    answer = await mine.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "What is 2 + 3?"}], temperature=0, max_tokens=128
    )
    found["answers"] = bool(answer.choices[0].message.content) and answer.choices[0].finish_reason == "stop"
    stream = await mine.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        temperature=0,
        max_tokens=128,
        stream=True,
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    found["streams the same"] = text == answer.choices[0].message.content
    found["first prompt is cold"] = await cached(mine, "What is 4 + 5?") == 0
    warm = await cached(mine, "What is 6 + 7?")
    found["a shared prefix is cached"] = warm >= 64
    found["another tenant shares nothing"] = await cached(other, "What is 6 + 7?") == 0
    spend = await asyncio.to_thread(
        _ask, f"http://127.0.0.1:{gateway.port}/leadline/v1/spend", {"Authorization": f"Bearer {gateway.key}"}
    )
    found["every call is in the ledger"] = json.loads(spend[0])["requests"] == 5
    asked = json.dumps({"model": "base", "messages": _messages("1 + 1"), "max_tokens": 1}).encode()
    sent = {"Content-Type": "application/json", "endpoint-load-metrics-format": "JSON"}
    _, headers = await asyncio.to_thread(_ask, f"{url}/chat/completions", sent, asked)
    told = headers.get("endpoint-load-metrics", "")
    found["it tells its load"] = load_of_header(told) is not None and "kv_cache_usage_perc" in told
    leaving = await mine.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "What is 2 + 3?"}], max_tokens=512, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for _ in leaving:
        break
    ran = await asyncio.to_thread(_running, url)
    await leaving.close()
    until = time.monotonic() + 10
    while (left := await asyncio.to_thread(_running, url)) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    found["a caller who leaves ends its generation"] = ran >= 1 and left == 0
    await asyncio.gather(mine.close(), other.close())
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with vllm(Path(sys.argv[1]).absolute(), folder) as url, serving(POLICY.format(url=url), folder) as gateway:
            found = asyncio.run(judge(gateway, url))
    for words, holds in found.items():
        print(f"vllm: {'yes' if holds else 'NO '} {words}", flush=True)  # noqa: T201
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
