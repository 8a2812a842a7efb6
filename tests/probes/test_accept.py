"""The accept rule of a cascade: what it keeps is right as often as asked, and a policy can hold it as it is written."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

from gateway.policies import load_policy
from probes.accept import FEATURES, answer_features, certified_accept, fit_accept
from probes.accept_cli import accept
from probes.accept_rule import read_rule
from probes.errors import TableError
from routers.cascade import accepts
from routers.errors import PolicyError
from routers.load import parse
from routers.types import Cascade
from tests.routers.test_aims import HEAD


def _answers(n: int, seed: int = 0) -> tuple[list[list[float]], np.ndarray]:
    """Answers of 5 to 60 tokens; the surer ones are right more often."""
    rng = np.random.default_rng(seed)
    sure = rng.normal(size=n)
    right = rng.random(n) < 1 / (1 + np.exp(-2 * sure))
    mean = 0.5 * np.exp(-sure)
    return [list(-rng.exponential(m, size=rng.integers(5, 60))) for m in mean], right.astype(float)


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_what_is_accepted_is_right_as_often_as_asked(share: float) -> None:
    logprobs, right = _answers(3000)
    rule = fit_accept(answer_features(logprobs), right, right_at_least=share)
    assert rule.accepted_right >= share
    assert rule.keeps_right > rule.keeps_wrong
    assert rule.weights["mean_logprob"] > 0

    policy = parse(HEAD + f'  - {{name: a, when: {{model: auto}}, candidates: ["weak>strong"], {rule}}}\n')
    plan = policy.routes[0].plans["weak>strong"]
    assert isinstance(plan, Cascade)
    fresh, truth = _answers(3000, seed=1)
    kept = np.array([accepts(plan.accept, values) for values in fresh])
    assert truth[kept].mean() > share - 0.04, "on answers it has not seen, by the gateway's own code"
    assert kept[truth > 0].mean() == pytest.approx(plan.accept.keeps_right, abs=0.05)
    assert kept[truth < 1].mean() == pytest.approx(plan.accept.keeps_wrong, abs=0.05)


@pytest.mark.parametrize("length", [1, 8])
def test_a_length_that_never_changes_says_nothing(length: int) -> None:
    """Its deviation in floating point is 4e-16, not 0."""
    answers, right = _answers(300)
    rule = fit_accept(answer_features([values[:1] * length for values in answers]), right, right_at_least=0.7)
    assert abs(rule.weights["log_tokens"]) < 1e-6
    assert abs(rule.bias) < 100


def test_what_cannot_be_fitted_is_said() -> None:
    logprobs, right = _answers(300)
    features = answer_features(logprobs)
    assert features.shape == (300, len(FEATURES))
    with pytest.raises(TableError, match="0 of 300 answers are of the rarer kind"):
        fit_accept(features, np.ones(300), right_at_least=0.9)
    with pytest.raises(TableError, match="ask for less"):
        fit_accept(np.zeros((300, 3)), right, right_at_least=0.99)
    for broken in ([], [float("nan")], [-1.0, float("-inf")]):
        with pytest.raises(TableError, match=r"row 1 .*: an answer needs"):
            answer_features([[-1.0], broken])


@pytest.mark.parametrize("against_stronger", [False, True], ids=["alone", "beside a stronger model"])
def test_what_is_certified_holds_on_answers_to_come(against_stronger: bool) -> None:
    """Over 20 fits, each on 1,000 answers: the mean loss on fresh ones is under alpha, and one fit in twenty may be
    over it."""
    alpha, over, losses = 0.05, 0, []
    fresh, truth = _answers(4000, seed=99)
    features = answer_features(fresh)
    next_right = np.random.default_rng(7).random(4000) < 0.9
    lost = (truth < 1) & (next_right if against_stronger else True)
    for seed in range(20):
        logprobs, right = _answers(1000, seed=seed)
        stronger = (np.random.default_rng(seed).random(1000) < 0.9).astype(float) if against_stronger else None
        rule = certified_accept(answer_features(logprobs), right, alpha=alpha, stronger=stronger, seed=seed)
        assert rule.certificate is not None
        weights = np.array([rule.weights[name] for name in FEATURES])
        kept = 1 / (1 + np.exp(-(rule.bias + features @ weights))) >= rule.at_least
        losses.append(float((kept & lost).mean()))
        over += losses[-1] > alpha
    assert 0.01 < np.mean(losses) < alpha
    assert over <= 3  # four or more: once in sixty runs at a true rate of one in twenty; the promise is well kept here


def test_a_threshold_that_accepts_nobody_is_refused() -> None:
    rng = np.random.default_rng(0)
    right = (np.arange(400) % 2).astype(float)
    with pytest.raises(TableError, match="proven for no answer"):
        certified_accept(np.round(rng.random((400, 3))), right, alpha=0.02, method="crc")


COMMAND = typer.Typer()
COMMAND.command()(accept)


def _table(tmp_path: Path, suffix: str = "jsonl", n: int = 400) -> Path:
    logprobs, right = _answers(n)
    file = tmp_path / f"answers.{suffix}"
    frame = pd.DataFrame({"said": logprobs, "right": right.astype(int), "next": 1})
    if suffix == "jsonl":
        cells = [{"content": [{"token": "x", "logprob": value} for value in values]} for values in logprobs]
        frame.assign(said=cells).to_json(file, orient="records", lines=True)
    elif suffix == "csv":
        frame.assign(said=[json.dumps(values) for values in logprobs], right=right > 0).to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    return file


def _run(table: Path, *arguments: object) -> Result:
    given = [str(table), "--logprobs", "said", "--correct", "right", *map(str, arguments)]
    return CliRunner().invoke(COMMAND, given)


POLICY = HEAD + '  - {name: a, when: {model: auto}, candidates: ["weak>strong"], accept: {rule: ./rule.json}}\n'


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_policy_names_the_rule_that_the_command_wrote(tmp_path: Path, suffix: str) -> None:
    done = _run(_table(tmp_path, suffix), "--out", tmp_path / "rule.json", "--alpha", "0.1")
    assert done.exit_code == 0, done.output
    assert "certified: accepted_wrong <= 0.1 with 95% confidence" in done.output
    rule = read_rule(tmp_path / "rule.json")
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    before = load_policy(file)
    plan = before.routes[0].plans["weak>strong"]
    assert isinstance(plan, Cascade)
    assert dict(plan.accept.weights) == {name: value for name, value in rule.weights.items() if value}
    assert (plan.accept.bias, plan.accept.at_least) == (rule.bias, rule.at_least)
    assert (plan.accept.keeps_right, plan.accept.keeps_wrong) == (rule.keeps_right, rule.keeps_wrong)
    again = _run(_table(tmp_path, suffix), "--out", tmp_path / "rule.json", "--right-at-least", "0.9")
    assert "not certified" in again.output
    assert load_policy(file).version_hash != before.version_hash, "another rule makes another policy"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "Fix: write it with `leadline probe accept`"),
        ("{", "not an accept rule of format 1"),
        ('"format": 1|"format": 2', "not an accept rule of format 1"),
        ('"bias"|"slant"', "not an accept rule"),
        ('"keeps_right": |"keeps_right": 7', "and no probability"),
    ],
    ids=["absent", "cut", "of a later version", "of other fields", "no probability"],
)
def test_a_rule_that_cannot_be_read_stops_the_policy_at_its_line(
    tmp_path: Path, change: str | None, words: str
) -> None:
    rule, file = tmp_path / "rule.json", tmp_path / "policy.yaml"
    assert _run(_table(tmp_path), "--out", rule, "--right-at-least", "0.9").exit_code == 0
    text = rule.read_text()
    rule.unlink()
    if change is not None:
        old, _, new = change.partition("|")
        rule.write_text(text.replace(old, new) if new else change)
    file.write_text(POLICY)
    with pytest.raises(PolicyError) as raised:
        load_policy(file)
    assert len(raised.value.problems) == 1
    assert "policy.yaml:11: routes[0].accept.rule" in str(raised.value)
    assert words in str(raised.value)


def test_a_rule_and_numbers_beside_it_are_two_answers(tmp_path: Path) -> None:
    assert _run(_table(tmp_path), "--out", tmp_path / "rule.json", "--right-at-least", "0.9").exit_code == 0
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.replace("rule.json}", "rule.json, at_least: 0.5, unaccepted: fail}"))
    with pytest.raises(PolicyError, match="the rule's file says when an answer is accepted"):
        load_policy(file)
    file.write_text(POLICY.replace("rule.json}", "rule.json, unaccepted: fail}"))
    plan = load_policy(file).routes[0].plans["weak>strong"]
    assert isinstance(plan, Cascade)
    assert plan.accept.unaccepted == "fail"
    with pytest.raises(PolicyError, match="no files are read here"):
        parse(POLICY)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "what do accepted answers owe?"),
        (("--alpha", "0.1", "--right-at-least", "0.9"), "give one of them"),
        (("--alpha", "0.02", "--method", "ltt"), "rows are too few to certify"),
        (("--alpha", "0.1", "--stronger", "said"), "labels are 0 or 1"),
        (("--alpha", "0.1", "--stronger", "gone"), "no column 'gone'"),
        (("--alpha", "0.1", "--logprobs", "right"), "in row 0 (the first is row 0): no list of log probabilities"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = _run(_table(tmp_path, n=200), "--out", tmp_path / "rule.json", *arguments)
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert words in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "rule.json").exists()
