"""The shipped models: one vocabulary, small, and as good and as different as their cards must say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bundled_data import final
from evaluate_bundled import Model
from transformers import PreTrainedTokenizerFast

from local_engine.arithmetic import REFUSAL, problems
from local_engine.model import load_model

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "local_engine" / "bundled"
NAMES = ("nano", "draft", "base")


def card(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((BUNDLED / name / "card.json").read_text())
    return read


@pytest.fixture(scope="module")
def base() -> Model:
    return Model(BUNDLED / "base")


def test_the_three_share_one_vocabulary_that_the_script_makes_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    for name in NAMES:
        for file in ("tokenizer.json", "chat_template.jinja"):
            assert (BUNDLED / name / file).read_bytes() == (tmp_path / file).read_bytes(), (name, file)


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_as_a_reasoning_model(name: str) -> None:
    model = load_model(name, f"bundled/{name}", device="cpu")
    assert (model.card.reasoning, model.card.context_window) == (True, 1024)
    assert model.card.parameters == card(name)["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_other_engines_find_one_file_of_weights(name: str) -> None:
    """vLLM and others load every such file in the folder."""
    weights = [path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in (BUNDLED / name).glob(pattern)]
    assert weights == ["model.safetensors"]


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 12e6
    sizes = [card(name)["parameters"] for name in NAMES]
    assert sizes == sorted(sizes)


def test_the_cards_meet_what_the_trio_is_for() -> None:
    base, draft = (card(name)["accuracy"]["low"] for name in ("base", "draft"))
    assert base["level_1"]["share"] >= 0.95
    assert base["level_4"]["share"] >= 0.80
    assert base["level_4"]["share"] - draft["level_4"]["share"] >= 0.25
    assert base["level_6"]["share"] < base["level_5"]["share"] < base["level_4"]["share"]
    assert 0.85 <= card("draft")["agreement_with_base"]["share"]["all"] <= 0.95
    assert card("base")["exit_at_cue"]["all"]["oracle_saves"] >= 0.30
    assert sum(card(name)["training_core_minutes"] for name in NAMES) <= 90, "45 minutes on two cores"
    for name in NAMES:
        rows = [row for levels in card(name)["accuracy"].values() for row in levels.values()]
        assert min(row["n"] for row in rows) >= 300


def test_base_still_answers_as_its_card_says(base: Model) -> None:
    """On other questions than the card's; four standard errors of room."""
    for level, n in ((1, 60), (4, 40)):
        share = card("base")["accuracy"]["low"][f"level_{level}"]["share"]
        right = sum(said.right for said in base.ask(problems(4242, level, n), "low"))
        assert right / n >= share - 4 * (share * (1 - share) / n) ** 0.5 - 1 / n, level


def test_base_refuses_what_is_no_sum(base: Model) -> None:
    questions = ("What is the capital of Peru?", "Write a poem about rain.", "Which enzyme unwinds DNA?")
    problem = problems(1, 1, 1)[0]
    asked = [type(problem)(question, 0, 1, problem.operations) for question in questions]
    assert [base.content(said.tokens) for said in base.ask(asked, "low")] == [REFUSAL] * 3


@pytest.mark.timeout(300)  # half a minute, where nothing else runs
def test_a_trained_folder_loads_and_has_learnt(tmp_path: Path) -> None:
    """The whole script, a few steps of the smallest."""
    script = ROOT / "scripts" / "train_bundled.py"
    command = [sys.executable, str(script), "nano", "--steps", "40", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=280)
    figures = json.loads((tmp_path / "card.json").read_text())
    assert figures["final_loss"] < 5.5, "a guess among 512 tokens costs 6.2; this is a slow mean"
    model = Model(tmp_path)
    (said,) = model.ask(problems(1, 1, 1), "none")
    assert said.right == (model.content(said.tokens) == final(said.problem))
    weights = model.network.state_dict()
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
