"""`leadline probe certify`: from a table to certificates in probe.json, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from probes.artifact import Artifact, read, write
from probes.commands import app
from probes.manifest import SKETCH, read_manifest, sketch
from probes.runtime import EncoderProbe
from probes.scored import opened, scored
from probes.table import read_table

HEADS = ["--prompt", "question", "--head", "weak=cheap", "--head", "strong=dear"]


def outcomes(n: int, seed: int) -> pd.DataFrame:
    """Sums, which both models get right, and essays, which mostly only the strong one does."""
    rng = np.random.default_rng(seed)
    essay = rng.random(n) < 0.5
    numbers = rng.integers(2, 10_000, (n, 2))
    return pd.DataFrame(
        {
            "question": [
                f"Write essay {a} on the fall of empire {b}." if one else f"What is {a} plus {b}?"
                for one, (a, b) in zip(essay, numbers, strict=True)
            ],
            "cheap": (rng.random(n) < np.where(essay, 0.2, 0.97)).astype(float),
            "dear": (rng.random(n) < np.where(essay, 0.9, 0.98)).astype(float),
        }
    )


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    """An artifact of random weights: a certificate is as true of a bad score as of a good one."""
    trained = artifact.manifest.model_copy(update={"prompts_sketch": sketch(outcomes(120, 0)["question"]), "n": 120})
    write(replace(artifact, manifest=trained), tmp_path / "probe")
    return tmp_path


def certify(folder: Path, table: pd.DataFrame, *options: str) -> Result:
    table.to_parquet(folder / "fresh.parquet")
    return CliRunner().invoke(app, ["certify", str(folder / "probe"), str(folder / "fresh.parquet"), *HEADS, *options])


def test_certificates_are_stored(folder: Path) -> None:
    fresh = outcomes(100, 1)
    done = certify(folder, fresh, "--json", str(folder / "c.json"), "--report", str(folder / "c.html"))
    assert done.exit_code == 0, done.output
    assert "no certificate for alpha 0.02 (ltt): 100 rows are too few" in done.output
    manifest = read(folder / "probe").manifest
    promised = [(one.alpha, one.method) for one in manifest.certificates]
    assert promised == [(0.02, "crc"), (0.05, "ltt"), (0.05, "crc"), (0.1, "ltt"), (0.1, "crc")]
    assert json.loads((folder / "c.json").read_text()) == [one.model_dump(mode="json") for one in manifest.certificates]
    one = manifest.certificate_for(0.1)
    assert one is not None
    assert str(one) in (folder / "c.html").read_text()
    assert (one.horizon, one.n, one.rows) == (100, 100, "held_out")

    probe = EncoderProbe.load(folder / "probe")
    found = probe.probe([[{"content": question}] for question in fresh["question"]])
    weak = np.array([one.accepts(p) for p in found])
    assert weak.mean() == pytest.approx(one.shares["weak"])
    assert (weak & (fresh["cheap"] == 0) & (fresh["dear"] == 1)).mean() == pytest.approx(one.risk)
    assert 0 < one.risk < 0.1

    again = certify(folder, fresh, "--alpha", "0.1", "--method", "ltt")
    assert again.exit_code == 0, again.output
    assert len(read(folder / "probe").manifest.certificates) == 5


def test_one_head_is_certified_for_acceptance(folder: Path) -> None:
    outcomes(60, 2).to_parquet(folder / "fresh.parquet")
    run = ["certify", str(folder / "probe"), str(folder / "fresh.parquet"), "--prompt", "question"]
    done = CliRunner().invoke(app, [*run, "--head", "weak=cheap", "--alpha", "0.1", "--method", "crc"])
    assert done.exit_code == 0, done.output
    one = read_manifest(folder / "probe").certificate_for(0.1, "accepted_wrong")
    assert one is not None
    assert one.heads == ("weak",)


@pytest.mark.parametrize(
    ("rows", "change", "options", "complaint"),
    [
        (40, {}, ["--alpha", "0.02"], "40 rows are too few to certify a loss of at most 0.02"),
        (40, {}, ["--alpha", "0.02", "--method", "crc"], "it takes 49; label more rows"),
        (40, {"cheap": math.nan}, [], "column 'cheap' holds no label"),
        (40, {"cheap": [math.nan, 1.0] * 20}, [], "20 of 40 rows lack a label of cheap or dear; label them, or give"),
        (
            60,
            {"cheap": [math.nan, 1.0] * 30},
            ["--known-only", "--alpha", "0.5"],
            "of 30 rows none can lose: labels of one",
        ),
        (200, {}, ["--alpha", "0"], "alpha 0.0 is no bound on a share"),
        (190, {}, ["--alpha", "0.1", "--method", "ltt", "--horizon", "5"], "it takes 195;"),
        (40, {}, ["--alpha", "0.1", "--method", "crc", "--head", "other=cheap"], "--head other: artifact"),
    ],
)
def test_what_proves_nothing_is_refused(
    folder: Path, rows: int, change: dict[str, object], options: list[str], complaint: str
) -> None:
    before = (folder / "probe" / "probe.json").read_bytes()
    done = certify(folder, outcomes(rows, 3).assign(**change), *options)
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())
    assert (folder / "probe" / "probe.json").read_bytes() == before


def test_rows_that_the_artifact_was_fitted_on_prove_nothing(folder: Path) -> None:
    trained = outcomes(120, 0)
    for table, about in [(trained, 120), (pd.concat([trained.head(60), outcomes(140, 4)]), 60)]:
        done = certify(folder, table)
        assert done.exit_code == 2
        assert f"was fitted on about {about} of these {len(table)} prompts" in done.output


def test_a_certificate_that_saves_nothing_says_so(folder: Path) -> None:
    """Where the surest rows are the wrong ones, only a threshold above all of them holds."""
    fresh = outcomes(120, 6)
    fresh.to_parquet(folder / "fresh.parquet")
    data = read_table(folder / "fresh.parquet", "question", {"weak": "cheap", "strong": "dear"})
    p = scored(data, opened(folder / "probe"))
    margin = p[:, 0] - p[:, 1]
    fresh = fresh.assign(cheap=(margin < np.median(margin)).astype(float), dear=1.0)
    done = certify(folder, fresh, "--alpha", "0.01", "--method", "crc")
    assert done.exit_code == 0, done.output
    assert "note: nothing can be kept at weak with a loss of at most 0.01 (crc)" in done.output
    assert "saves nothing" not in certify(folder, outcomes(120, 7), "--alpha", "0.9", "--method", "crc").output


def test_a_few_repetitions_are_a_warning(folder: Path) -> None:
    done = certify(folder, pd.concat([outcomes(120, 0).head(4), outcomes(116, 5)]), "--alpha", "0.1", "--method", "crc")
    assert done.exit_code == 0, done.output
    assert "warning: toy@" in done.output
    assert "was fitted on about 4 of these 120 prompts" in done.output


def test_shared_prompts_are_noticed_in_a_sketch_of_many(artifact: Artifact) -> None:
    trained = [f"question {i}" for i in range(10 * SKETCH)]
    big = artifact.manifest.model_copy(update={"prompts_sketch": sketch(trained), "n": len(trained)})
    others = [f"another question {i}" for i in range(10_000)]
    assert big.seen(others) == 0
    assert len(big.prompts_sketch) == SKETCH
    assert big.seen(others + trained[:2000]) == pytest.approx(2000, rel=0.35)
    # Chance repetitions are not held against a table.
    assert big.seen(others + list(trained[:20])) == 0
