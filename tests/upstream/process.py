"""The fake upstream as a process of its own, for tests whose gateway must not share its event loop."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.upstream.truth import Row, read_truth


class UpstreamProcess(NamedTuple):
    url: str
    """The base URL, up to and with /v1."""
    truth: Path
    process: "subprocess.Popen[bytes]"

    def rows(self) -> list[Row]:
        return read_truth(self.truth)


@contextlib.contextmanager
def upstream_process(truth: Path, *, seed: int = 0) -> Iterator[UpstreamProcess]:
    """Up when entered, down when left."""
    command = [sys.executable, "-m", "tests.upstream", "--truth", str(truth), "--seed", str(seed)]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=env)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        assert url, f"the fake upstream ended with {process.wait(10)}"
        yield UpstreamProcess(url, truth, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
