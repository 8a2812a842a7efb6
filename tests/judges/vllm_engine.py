"""The vLLM adapter before a real vLLM: `python -m tests.judges.vllm_engine VENV`. Exit status 1 if a check fails.

VENV is what scripts/install_vllm.sh made. Checked beside what engine_servers.py says: tenants kept apart by salts, and
the load header.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gateway.upstream.engines import load_of_header
from tests.conftest import free_port
from tests.judges.engine_servers import MODEL, ask, report, started, with_system


@contextmanager
def vllm(venv: Path, folder: Path) -> Iterator[str]:
    """A vLLM server with the bundled model; yields its base URL."""
    port = free_port()
    command = [
        str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "8", "--dtype", "float32",
        "--enable-prompt-tokens-details", "--enable-prefix-caching", "--reasoning-parser", "qwen3",
    ]  # fmt: skip
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with started(command, env, folder / "vllm.log", f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}/v1"


def running(url: str) -> float:
    text = ask(url.removesuffix("/v1") + "/metrics", {})[0].decode()
    return sum(
        float(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", text, re.M)
    )


def load(url: str) -> Mapping[str, bool]:
    asked = json.dumps({"model": "base", "messages": with_system("1 + 1"), "max_tokens": 1}).encode()
    sent = {"Content-Type": "application/json", "endpoint-load-metrics-format": "JSON"}
    told = ask(f"{url}/chat/completions", sent, asked)[1].get("endpoint-load-metrics", "")
    return {"it tells its load": load_of_header(told) is not None and "kv_cache_usage_perc" in told}


if __name__ == "__main__":
    sys.exit(report("vllm", partial(vllm, Path(sys.argv[1]).absolute()), running, load, salted=True))
