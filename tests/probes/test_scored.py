"""`leadline probe eval` and `score` of what a local model reads: fitted there, measured there."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from probes.artifact import read
from probes.cli import app
from probes.errors import ArtifactError
from probes.score import prober
from probes.scored import scored
from probes.table import read_table

ARTIFACT = Path(__file__).parents[2] / "probes/artifacts/prefill-base"


def _table(folder: Path) -> Path:
    """24 sums, the longer half of them labelled as failed."""
    sums = [" + ".join(["7"] * (2 + n % 2 * 30)) for n in range(24)]
    table = folder / "sums.parquet"
    pd.DataFrame({"prompt": [f"What is {one}?" for one in sums], "right": [1.0, 0.0] * 12}).to_parquet(table)
    return table


def test_what_a_local_model_reads_is_measured_on_other_rows(tmp_path: Path) -> None:
    head = read(ARTIFACT).heads.names[0]
    table, told = _table(tmp_path), tmp_path / "told.json"
    command = ["eval", str(table), str(ARTIFACT), "--prompt", "prompt", "--head", f"{head}=right", "--json", str(told)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    auc = next(row["value"] for row in json.loads(told.read_text()) if row["metric"] == "AUC")
    assert auc == 1.0, "two terms are easier than thirty-two"


def test_rows_are_scored_by_the_artifacts_model_and_no_other(tmp_path: Path) -> None:
    probe = read(ARTIFACT)
    data = read_table(_table(tmp_path), "prompt", {probe.heads.names[0]: "right"})
    with pytest.raises(ArtifactError, match="was fitted on encoder 'bundled/base'"):
        scored(data, probe, "bundled/draft")
    rows = prober(ARTIFACT, "default").probe([[{"role": "user", "content": text}] for text in data.prompts])
    assert [row["local"] for row in rows] == pytest.approx(scored(data, probe)[:, 0].tolist(), abs=1e-6)
    assert prober(ARTIFACT, "default").probe([]) == []
    assert np.all(((p := scored(data, probe)) >= 0) & (p <= 1))
