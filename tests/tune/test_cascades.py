"""The rule by which a smaller model's answer is taken, fitted for `leadline tune` on answers of the bundled models."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.tune.cascades import fitted_cascade
from gateway.world import engine_plan
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.plan_types import Cascade
from local_engine.reason.trajectories import Question, arithmetic_questions, ask, is_right
from local_engine.types import SamplingParams
from probes.errors import TableError
from routers.plan_files import read_plan

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=400)


@pytest.fixture(scope="module")
def engine() -> "Engine":
    models = {name: load_model(name, f"bundled/{name}", "float32", "cpu") for name in ("base", "draft")}
    return Engine(models, max_running=8)


def test_a_rule_is_fitted_that_takes_what_is_right(engine: Engine) -> None:
    engine.start()
    try:
        questions = arithmetic_questions(3, 15, "fit")
        rule = fitted_cascade(engine, "base", "draft", questions, SAMPLING)
        assert 0.1 < rule.accepted < 1
        assert rule.keeps_right > 2 * rule.keeps_wrong
        accept = {"weights": rule.weights, "bias": rule.bias, "at_least": rule.at_least}
        plan = engine_plan(read_plan({"cascade": {"draft": "small", "accept": accept}}), "draft")
        assert isinstance(plan, Cascade)
        fresh = arithmetic_questions(4, 8, "test")
        ended = list(ask(engine, "base", fresh, SAMPLING, plan))
        taken = [(q, said) for q, said, end in ended if end.plan is not None and not end.plan.escalated]
        assert 0 < len(taken) < len(fresh)
        right = sum(is_right(said, question.answer) for question, said in taken)
        assert right >= 0.7 * len(taken)
        with pytest.raises(TableError, match="20 right and wrong are needed"):
            fitted_cascade(engine, "base", "draft", [Question("1", "What is 2 + 3?", "5", "")], SAMPLING)
    finally:
        engine.stop()


def test_tune_measures_a_cascade_beside_the_other_plans(tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text("""
version: 1
providers: {home: {engine: embedded}}
models:
  local: {provider: home, model: bundled/draft, context: 1024}
  small: {provider: home, model: bundled/nano, context: 1024}
""")
    arguments = ["tune", str(policy), "--model", "local", "--effort", "low", "--per-level", "1", "--max-tokens", "64"]
    arguments += ["--json", str(tmp_path / "told.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(r"no cascade of small at effort low: \d+ of \d+ answers are of the rarer kind", result.output)
    plans = [plan["name"] for plan in json.loads((tmp_path / "told.json").read_text())["efforts"]["low"]]
    assert plans[0] == "no plan"
    assert "small writes steps" in plans
    assert "small answers first" not in plans
