"""The demo itself, from the command line: with the recordings where they are, and without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LEADLINE_DATA") or ROOT.parent / "shared" / "data")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def demo(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "demo.py", *arguments],
        env={**os.environ, "LEADLINE_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.skipif(
    not (DATA / "routellm_gsm8k.parquet").is_file(),
    reason="the recorded answers are not in ../shared/data, nor in $LEADLINE_DATA",
)
def test_a_few_questions_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    done = demo("--limit", "12", "--skip-fitted", "--out", str(out), data=DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree to the nano-dollar" in done.stdout
    rows = {(row["name"], row["metric"]): row["value"] for row in json.loads(out.read_text())["rows"]}
    assert rows["always strong: GPT-4-1106", "strong_share"] == 1
    assert rows["always weak: Mixtral-8x7B", "strong_share"] == 0
    assert rows["Leadline, shipped probe", "n"] == 12
    assert rows["cache, asked again", "hits_with_the_same_text"] == 12
    assert rows["proof", "calls_joined"] == 12 * 5 + 12
    assert rows["proof", "differences"] == 0
    assert rows["proof", "spent"] > 0


def test_without_the_recordings_it_says_so_and_runs_the_arithmetic(tmp_path: Path) -> None:
    done = demo("--limit", "12", data=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without the recorded answers only the arithmetic part runs" in done.stdout
    assert "arithmetic, answered locally" in done.stdout
    assert "agree to the nano-dollar: 12 calls" in done.stdout
