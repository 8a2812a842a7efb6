"""`leadline exits` on trajectories that were made up: nothing is generated, but for two questions of `compare`."""

import random
import shutil
from fnmatch import fnmatch
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.exits.fitting import certify_artifact, fit_artifact, proofs
from local_engine.config import locate
from local_engine.reason.artifact import MANIFEST, TENSORS, read, read_for
from local_engine.reason.thought import FEATURES
from local_engine.reason.trajectories import CueOutcome, Trajectory, arithmetic_questions
from probes.errors import CertificateError
from probes.prefill import weights_sha256


def made(keys: list[str], seed: int = 0) -> list[Trajectory]:
    """One or two cues each; the surprise of the pass says how likely the answer is right."""
    rng = random.Random(seed)
    found = []
    for key in keys:
        cues = []
        hard = rng.random()
        for at in range(rng.randint(1, 2)):
            values = [rng.random() for _ in FEATURES]
            values[FEATURES.index("pass_min_logprob")] = -hard
            right = rng.random() > hard**2
            cues.append(CueOutcome(20 * (at + 1), values, "7", 9, right))
        found.append(Trajectory(key, "level 1", rng.randint(10, 40), 90, 80, "7", rng.random() > 0.2, cues))
    return found


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    return made([str(n) for n in range(1200)])


def test_the_artifact_promises_what_the_other_half_proves(trajectories: list[Trajectory]) -> None:
    fitted = fit_artifact(trajectories, model="m", weights_sha256="w", effort="high")
    manifest = fitted.artifact.manifest
    assert manifest.n_fit + manifest.n_calibration == 1200
    assert manifest.metrics["auc"] > 0.7
    for one, at in zip(manifest.certified, manifest.metrics["at"], strict=True):
        assert one.n == manifest.n_calibration
        if one.form != "per_event":
            assert at["risk"] <= one.delta
    loose, strict = (fitted.artifact.manifest.threshold(delta, "expected", "wrong") for delta in (0.1, 0.02))
    assert loose < strict
    held = {(one["form"], one["delta"]): one for one in proofs(fitted.artifact, trajectories, deltas=[0.05, 0.1])}
    assert held["high_probability", 0.1]["held"] >= 0.9
    assert held["expected", 0.1]["mean_risk"] <= 0.1


def test_what_was_fitted_on_never_certifies(trajectories: list[Trajectory]) -> None:
    artifact = fit_artifact(trajectories, model="m", weights_sha256="w", effort="high").artifact
    again = certify_artifact(artifact, trajectories)
    assert again.artifact.manifest.certified == artifact.manifest.certified
    assert again.artifact.probe == artifact.probe


def test_few_trajectories_certify_little_and_say_so(trajectories: list[Trajectory]) -> None:
    artifact = fit_artifact(trajectories, model="m", weights_sha256="w", effort="high").artifact
    few = certify_artifact(artifact, made([f"new {n}" for n in range(120)], seed=2))
    assert {one.delta for one in few.artifact.manifest.certified if one.form == "high_probability"} <= {0.1, 0.2, 0.05}
    assert any("delta 0.01, expected, wrong" in problem and "too few" in problem for problem in few.not_certified)
    with pytest.raises(CertificateError, match=r"delta 0\.01, expected, wrong"):
        certify_artifact(artifact, made(["a", "b", "c"]))


def kept_file(folder: Path, seed: int, per_level: int) -> Path:
    """A finished run: every question that the command will ask is answered."""
    path = folder / f"{seed}.jsonl"
    keys = [question.key for question in arithmetic_questions(seed, per_level, "fit")]
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in made(keys)))
    return path


def test_fit_and_certify_write_an_artifact_and_a_page(tmp_path: Path) -> None:
    out, page = tmp_path / "artifact", tmp_path / "page.html"
    options = ["--per-level", "60", "--delta", "0.2", "--delta", "0.1", "--report", str(page)]
    fit = ["exits", "fit", str(kept_file(tmp_path, 5, 60)), "--seed", "5", "--out", str(out), *options]
    done = CliRunner().invoke(app, fit)
    assert done.exit_code == 0, done.output
    assert "delta 0.1, high_probability, wrong: leaves" in done.output
    first = read(out)
    assert first is not None
    assert {one.delta for one in first.manifest.certified} == {0.1, 0.2}
    assert "Do they hold?" in page.read_text()
    certify = ["exits", "certify", str(kept_file(tmp_path, 6, 60)), "--seed", "6", "--artifact", str(out), *options]
    done = CliRunner().invoke(app, certify)
    assert done.exit_code == 0, done.output
    second = read(out)
    assert second is not None
    assert second.probe == first.probe
    assert second.manifest.data_sha256 != first.manifest.data_sha256


def test_a_fit_beside_the_weights_adds_nothing_that_is_loaded_as_weights(tmp_path: Path) -> None:
    model = tmp_path / "draft"
    shutil.copytree(locate("bundled/draft")[0], model)
    before, heard = {path.name for path in model.iterdir()}, weights_sha256(model)
    fit = ["exits", "fit", str(kept_file(tmp_path, 5, 60)), "--seed", "5", "--per-level", "60", "--delta", "0.2"]
    done = CliRunner().invoke(app, [*fit, "--model", str(model)])
    assert done.exit_code == 0, done.output
    added = {path.name for path in model.iterdir()} - before
    assert added == {MANIFEST, TENSORS}
    assert not any(fnmatch(name, pattern) for name in added for pattern in ("*.safetensors", "*.bin", "*.pt"))
    assert read_for(model) is not None
    assert weights_sha256(model) == heard, "what hears the model goes on hearing it"


def test_a_delta_that_cannot_be_certified_is_an_error(tmp_path: Path) -> None:
    command = ["exits", "fit", str(kept_file(tmp_path, 5, 60)), "--seed", "5", "--out", str(tmp_path / "a")]
    done = CliRunner().invoke(app, [*command, "--per-level", "60", "--delta", "0.001"])
    assert done.exit_code == 2
    assert "too few to certify a loss of at most 0.001" in done.output
    assert not (tmp_path / "a").exists()


def test_compare_shows_every_method_beside_leaving_it_off(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 3", "answer": "5"}\n{"question": "7 * 8", "answer": "56"}\n')
    done = CliRunner().invoke(app, ["exits", "compare", "--questions", str(questions), "--max-tokens", "120"])
    assert done.exit_code == 0, done.output
    for name in ("leave it off", "probe, delta 0.05", "momentum (MUR)", "redundancy (TrimR)", "convergence"):
        assert name in done.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--model", "some/hub-id"], "give a local folder"),
        (["--model", "./nowhere"], "there is no folder"),
        (["--effort", "none"], "without a thought"),
        (["--delta", "0.05", "--delta", "0"], "--delta 0: a share of requests between 0 and 1, such as 0.05"),
        (["--delta", "nan"], "--delta nan: a share"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, options: list[str], problem: str) -> None:
    done = CliRunner().invoke(app, ["exits", "fit", str(tmp_path / "t.jsonl"), "--per-level", "1", *options])
    assert done.exit_code == 2
    assert problem in done.output


def test_questions_that_are_not_there_are_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["exits", "compare", "--questions", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 2
    assert "none.jsonl: no such file or directory" in done.output.replace("\n", "")


def test_a_bad_line_of_questions_is_named(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 3", "answer": "5"}\n{"question": "7"}\n')
    done = CliRunner().invoke(app, ["exits", "compare", "--questions", str(questions)])
    assert done.exit_code == 2
    assert "line 2" in done.output
