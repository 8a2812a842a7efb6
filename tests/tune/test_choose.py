"""What a preference takes, from what plans did on the same questions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.tune.choose import Measured, choose, measured
from gateway.tune.preferences import Preference
from routers.load import load


def plan(name: str, accuracy: float, cost: float, surely: float = -1.0) -> Measured:
    return Measured(name, (accuracy, 0.0, 1.0), (0.0, surely, 1.0), 100.0, (cost, cost, cost))


PLANS = [
    plan("no plan", 0.90, 1.0),
    plan("lucky", 0.93, 2.0),
    plan("near", 0.895, 0.7),
    plan("far", 0.86, 0.4),
    plan("lost", 0.80, 0.1),
]


@pytest.mark.parametrize(("preference", "taken"), [("quality", "no plan"), ("balanced", "near"), ("economy", "far")])
def test_each_preference_gives_up_so_much_accuracy(preference: Preference, taken: str) -> None:
    assert choose(PLANS, preference).name == taken


def test_a_plan_that_is_better_for_certain_is_what_others_are_compared_with() -> None:
    better = [*PLANS, plan("vote", 0.95, 3.0, surely=0.01)]
    assert choose(better, "quality").name == "vote"
    assert choose(better, "economy").name == "no plan", "0.90 is within 5 points of 0.95, what is cheaper is not"


def test_what_is_measured_is_paired_by_question() -> None:
    right = {"no plan": [True, False] * 50, "other": [True, True] * 50}
    rows = measured(right, {"no plan": 1000.0, "other": 500.0}, {"no plan": [2.0] * 100, "other": [1.0] * 100})
    assert [row.name for row in rows] == ["no plan", "other"]
    assert rows[1].gain[0] == pytest.approx(0.5)
    assert 0.35 < rows[1].gain[1] < 0.5 < rows[1].gain[2] < 0.65
    assert rows[1].cost == pytest.approx((0.5, 0.5, 0.5))
    assert (rows[0].tokens, rows[1].tokens) == (10.0, 5.0)
    assert rows[0].gain == (0.0, 0.0, 0.0)


POLICY = """\
version: 1
providers:
  home: {engine: embedded}
models:
  local: {provider: home, model: bundled/draft, context: 1024, plan: {exit: {rule: momentum}}}  # mine
  small: {provider: home, model: bundled/nano, context: 1024}
"""


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_tune_measures_here_and_writes_what_it_chose(tmp_path: Path) -> None:
    file, out = tmp_path / "policy.yaml", tmp_path / "out.json"
    file.write_text(POLICY)
    asked = ["tune", str(file), "--model", "local", "--effort", "high", "--per-level", "1", "--prefer", "economy"]
    run = subprocess.run(
        [sys.executable, "-m", "gateway", *asked, "--max-tokens", "150", "--write", "--json", str(out)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["efforts"]["high"]}
    assert {"no plan", "exit by convergence", "small writes steps"} <= rows.keys()
    assert rows["no plan"]["cost"] == [1.0, 1.0, 1.0]
    assert all(row["tokens"] > 0 for row in rows.values())
    assert "# mine" in file.read_text()
    local = load(file).models["local"]
    chosen = next(line for line in run.stdout.splitlines() if "chosen" in line)
    assert ({effort for effort, _ in local.plans} == {"high"}) == ("no plan" not in chosen)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--model", "nobody"], "it has local, small"),
        (["--model", "local", "--effort", "none"], "without a thought there is nothing to plan"),
        (["--model", "local", "--questions", "/nowhere"], "/nowhere: no such file"),
        (["--model", "local", "--questions", "policy.yaml"], "policy.yaml, line 1: "),
    ],
)
@pytest.mark.engine
def test_bad_input_is_named(tmp_path: Path, asked: list[str], words: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    asked = [str(file) if one == "policy.yaml" else one for one in asked]
    run = subprocess.run(
        [sys.executable, "-m", "gateway", "tune", str(file), *asked], capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0
    assert words in run.stderr
    assert "Traceback" not in run.stderr
    assert file.read_text() == POLICY
