"""The llama.cpp adapter before a real llama-server: `python -m tests.judges.llamacpp_engine VENV`. Exit status 1 if a
check fails.

VENV is what scripts/install_llamacpp.sh made. Checked beside what engine_servers.py says: its slots tell its load.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gateway.upstream.engines import CAPABILITIES, Load, load_of_body
from tests.conftest import free_port
from tests.judges.engine_servers import MODEL, ask, report, started

WRITE = Path(__file__).parents[2] / "scripts" / "write_gguf.py"


@contextmanager
def llamacpp(venv: Path, folder: Path) -> Iterator[str]:
    """A llama-server with the bundled model; yields its base URL."""
    port, model = free_port(), folder / "base.gguf"
    subprocess.run([venv / "bin" / "python", WRITE, "--float32", MODEL, model], check=True)
    command = [
        str(venv / "bin" / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-t", "1", "-c", "8192", "-np", "8", "-ctk", "f32", "-ctv", "f32",
    ]  # fmt: skip
    with started(command, {}, folder / "llamacpp.log", f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}/v1"


def _load(url: str) -> Load | None:
    path = CAPABILITIES["llamacpp"].load_path
    return load_of_body("llamacpp", ask(f"{url.removesuffix('/v1')}{path}", {})[0])


def running(url: str) -> float:
    told = _load(url)
    return -1 if told is None else told.requests


def load(url: str) -> Mapping[str, bool]:
    return {"it tells its load": _load(url) == Load(0.0)}


if __name__ == "__main__":
    sys.exit(report("llamacpp", partial(llamacpp, Path(sys.argv[1]).absolute()), running, load, salted=False))
