"""The same random 29M Qwen3 on Leadline's engine and on its peers: tokens per second of B callers at once.

In process: our engine through its link, and `transformers.generate` on a padded batch (its best case: all prompts of
one length). Over HTTP: `leadline engine --listen`, `transformers serve --continuous-batching`, and vLLM and llama.cpp's
server where `scripts/install_vllm.sh .bench/vllm` and `scripts/install_llamacpp.sh .bench/llamacpp` have put them. All
have the same number of threads; prompts differ from their first token on, so that no prefix cache helps anybody; each
answer is NEW tokens long.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import torch
from engine_steps import random_model
from measured import Measured
from services import free_port
from transformers import AutoTokenizer, GenerationConfig

from local_engine.config import locate
from local_engine.engine import Engine
from local_engine.model import LocalModel
from local_engine.types import Event, Finished, Generate, SamplingParams

PROMPT: Final = 128
NEW: Final = 64
START_S: Final = 300
VLLM: Final = Path(".bench/vllm")
VLLM_MODEL: Final = "vllm-model"
LLAMACPP: Final = Path(".bench/llamacpp")
LLAMACPP_MODEL: Final = "llamacpp-model"
WRITE_GGUF: Final = Path(__file__).parents[1] / "scripts" / "write_gguf.py"
GENERATE, SERVE = "transformers generate", "transformers serve"
OURS, OURS_HTTP = "leadline engine", "leadline engine, HTTP"
VLLM_NAME, LLAMACPP_NAME = "vLLM", "llama.cpp"


def versions() -> dict[str, str]:
    """Of the peers that are installed, by the words that their scripts left."""
    stamps = {VLLM_NAME: VLLM / ".installed", LLAMACPP_NAME: LLAMACPP / ".installed"}
    return {name: stamp.read_text().strip() for name, stamp in stamps.items() if stamp.exists()}


def digits(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice("0123456789") for _ in range(count))


def messages(seed: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": digits(seed, PROMPT - 12)}]


def measure(batches: tuple[int, ...], seed: int, into: Measured, threads: int, published: torch.dtype) -> None:
    """One round: every peer at every batch size. Raises nothing for a peer that is not installed."""
    torch.set_num_threads(threads)
    for batch, rate in ours(random_model("29m", torch.float32, published), batches, seed).items():
        into.add(f"{OURS}, batch {batch}", "tokens_per_s", rate, "1/s")
    model = random_model("29m", torch.float32, published)  # the same weights in transformers' own hands
    for batch in batches:
        into.add(f"{GENERATE}, batch {batch}", "tokens_per_s", generate(model, batch, seed), "1/s")
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as name:
        folder = Path(name)
        save(model, folder / "model", published)
        for title, serve in (
            (OURS_HTTP, leadline),
            (SERVE, transformers_serve),
            *(((VLLM_NAME, vllm),) if (VLLM / ".installed").exists() else ()),
            *(((LLAMACPP_NAME, llamacpp),) if (LLAMACPP / ".installed").exists() else ()),
        ):
            with serve(folder, threads) as (url, wire_model):
                for batch in batches:
                    rate = asyncio.run(over_http(url, wire_model, batch, seed))
                    into.add(f"{title}, batch {batch}", "tokens_per_s", rate, "1/s")


def save(model: LocalModel, folder: Path, published: torch.dtype) -> None:
    """As a checkpoint that ends no turn by itself. Takes the model's weights."""
    source, _ = locate("bundled/base")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.network.generation_config = GenerationConfig(max_length=4096, do_sample=False)
    model.network.to(published).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(model: LocalModel, batches: tuple[int, ...], seed: int) -> dict[int, float]:
    engine = Engine({"m": dataclasses.replace(model, end_tokens=frozenset())}, max_running=max(batches))
    engine.start()
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link, rates = engine.connect(arrived.put), {}
    sampling = SamplingParams(temperature=0, max_tokens=NEW)
    try:
        for batch in batches:
            for turn in (0, 1):  # the first warms up
                began = time.perf_counter()
                for at in range(batch):
                    said = json.dumps(messages(seed + 1000 * turn + 100_000 * batch + at)).encode()
                    link.submit(Generate(turn * 1000 + at, "m", said, sampling))
                left = batch
                while left:
                    ended = [event for event in arrived.get() if isinstance(event, Finished)]
                    assert all(event.output_tokens == NEW for event in ended), ended
                    left -= len(ended)
                rates[batch] = batch * NEW / (time.perf_counter() - began)
    finally:
        link.close()
        engine.stop()
    return rates


@torch.inference_mode()
def generate(model: LocalModel, batch: int, seed: int) -> float:
    rows = [
        model.tokenizer.apply_chat_template(messages(seed + 7_000_000 + at), add_generation_prompt=True)["input_ids"]
        for at in range(batch)
    ]
    shortest = min(map(len, rows))
    ids = torch.tensor([row[-shortest:] for row in rows])
    rate = 0.0
    for _ in range(2):
        began = time.perf_counter()
        out = model.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
        rate = batch * (out.shape[1] - shortest) / (time.perf_counter() - began)
    return rate


async def over_http(url: str, model: str, batch: int, seed: int) -> float:
    """Tokens per second of `batch` callers at once, each waiting for its whole answer."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(at: int) -> int:
            body: dict[str, Any] = {
                "model": model, "messages": messages(at), "max_tokens": NEW, "temperature": 0,
            }  # fmt: skip
            if model in (VLLM_MODEL, LLAMACPP_MODEL):  # they take the tokenizer's end of turn for the model's
                body["ignore_eos"] = True
            answer = await client.post("/chat/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        rate = 0.0
        for turn in (0, 1):
            began = time.perf_counter()
            first = seed + 1000 * turn + 300_000 * batch
            tokens = sum(await asyncio.gather(*(ask(first + at) for at in range(batch))))
            rate = tokens / (time.perf_counter() - began)
        return rate


POLICY: Final = """
version: 1
providers: {{home: {{engine: embedded}}}}
models: {{m: {{provider: home, model: "{model}", context: 1024, speculation: off}}}}
"""


@contextlib.contextmanager
def leadline(folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    """Without drafts: what a random model writes repeats itself, and is drafted far better than what people ask for."""
    port, model = free_port(), str(folder / "model")
    policy = folder / "policy.yaml"
    policy.write_text(POLICY.format(model=model))
    command = [
        sys.executable, "-m", "gateway", "engine", "--listen", f"127.0.0.1:{port}", "--policy", str(policy),
    ]  # fmt: skip
    with _serving(command, f"http://127.0.0.1:{port}/health", folder / "leadline.log", threads):
        yield f"http://127.0.0.1:{port}/v1", model


@contextlib.contextmanager
def transformers_serve(folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port),
        "--continuous-batching", "--dtype", "float32", "--device", "cpu", str(folder / "model"),
    ]  # fmt: skip
    with _serving(command, f"http://127.0.0.1:{port}/health", folder / "serve.log", threads):
        yield f"http://127.0.0.1:{port}/v1", str(folder / "model")


@contextlib.contextmanager
def vllm(folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    port = free_port()
    command = [
        str(VLLM.absolute() / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(folder / "model"), "--served-model-name", VLLM_MODEL, "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "32",
        "--dtype", "float32",
    ]  # fmt: skip
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with _serving(command, f"http://127.0.0.1:{port}/health", folder / "vllm.log", threads, env):
        yield f"http://127.0.0.1:{port}/v1", VLLM_MODEL


@contextlib.contextmanager
def llamacpp(folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    """Weights as the checkpoint has them, which everybody else here makes float32 of; keys and values in float16, as it
    has them unless told. Without its flash attention, which is slower here (32 callers: 227 tokens a second instead of
    313)."""
    port, model = free_port(), folder / "model.gguf"
    subprocess.run([LLAMACPP / "bin" / "python", WRITE_GGUF, folder / "model", model], check=True)
    command = [
        str(LLAMACPP.absolute() / "bin" / "llama-server"), "-m", str(model), "-a", LLAMACPP_MODEL,
        "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads),
        "-np", "32", "-c", "32768", "-fa", "off",
    ]  # fmt: skip
    with _serving(command, f"http://127.0.0.1:{port}/health", folder / "llamacpp.log", threads):
        yield f"http://127.0.0.1:{port}/v1", LLAMACPP_MODEL


@contextlib.contextmanager
def _serving(
    command: list[str], health: str, log: Path, threads: int, env: dict[str, str] | None = None
) -> Iterator[None]:
    count = str(threads)
    own = {
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "LEADLINE_ENGINE_THREADS": count, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or "gateway" in command}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**inherited, **own, **(env or {})}, stdout=out, stderr=out)
    try:
        until = time.monotonic() + START_S
        while not _answers(health):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.TransportError:
        return False
