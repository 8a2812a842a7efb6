"""Artifacts side by side: paired, against the first, on the same rows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from probes.artifact import Artifact, write
from probes.calibrate import brier, sigmoid
from probes.commands import app
from probes.compare import compare
from probes.evaluate import apgr
from probes.manifest import Certificate
from probes.table import Table
from tests.probes.test_certificate import CERTIFICATE


@pytest.fixture(scope="module")
def table() -> tuple[Table, np.ndarray]:
    rng = np.random.default_rng(4)
    hard = rng.normal(size=500)
    p = sigmoid(np.column_stack([0.5 - hard, 2.0 - hard]))
    labels = (rng.random((500, 2)) < p).astype(float)
    labels[0, 0] = np.nan
    return Table([str(i) for i in range(500)], labels, ("weak", "strong"), ("a", "b")), p


def test_each_is_held_against_the_first(table: tuple[Table, np.ndarray]) -> None:
    data, p = table
    blunt = np.full_like(p, 0.5) + p / 1000
    rows = {row.measure: row for row in compare(data, {"good": p, "blunt": blunt, "same": p}, times=200)}
    y, known = data.labels[1:], slice(1, None)
    assert rows["weak: Brier"].values[0] == pytest.approx(brier(p[known, 0], y[:, 0]))
    assert rows["APGR"].values[0] == pytest.approx(apgr(p[known, 1] - p[known, 0], y[:, 0], y[:, 1]))
    gap, low, high = rows["weak: Brier"].differences[0]
    assert 0 < low < gap < high
    assert gap == pytest.approx(rows["weak: Brier"].values[1] - rows["weak: Brier"].values[0])
    # Paired: the same scores differ in no resample, though either alone varies.
    for row in rows.values():
        assert row.differences[1] == (0, 0, 0)


def test_certificates_are_compared_by_what_they_lose_and_keep(table: tuple[Table, np.ndarray]) -> None:
    data, p = table
    certificates: list[Certificate | None] = [
        CERTIFICATE.model_copy(update={"threshold": threshold}) for threshold in (-0.1, -0.3)
    ]
    rows = {row.measure: row for row in compare(data, {"a": p, "b": p}, certificates, times=50)}
    weak = p[1:, 0] - p[1:, 1] > -0.1
    lost = weak & (data.labels[1:, 0] < data.labels[1:, 1])
    assert rows["kept by it at weak"].values[0] == pytest.approx(weak.mean())
    assert rows["loss by certificate (5%)"].values[0] == pytest.approx(lost.mean())
    assert rows["kept by it at weak"].differences[0][1] > 0
    assert "kept by it at weak" not in {row.measure for row in compare(data, {"a": p, "b": p}, [None, None], times=9)}


def test_the_command(artifact: Artifact, shifted: Artifact, tmp_path: Path) -> None:
    write(artifact, tmp_path / "one")
    write(shifted, tmp_path / "two")
    rng = np.random.default_rng(0)
    questions = [f"What is {a} plus {b}?" for a, b in rng.integers(2, 99, (30, 2))]
    frame = pd.DataFrame({"q": questions, "weak": [0, 1] * 15, "strong": [1, 1, 0] * 10})
    frame.to_csv(tmp_path / "t.csv", index=False)
    options = ["--prompt", "q", "--head", "weak=weak", "--head", "strong=strong", "--json", str(tmp_path / "out.json")]
    folders = [str(tmp_path / name) for name in ("one", "two")]
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "t.csv"), *folders, *options])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out.json").read_text())
    assert len(told["artifacts"]) == 2
    assert [row["measure"] for row in told["measures"]][-3:] == ["APGR", "CPT50", "CPT80"]
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "t.csv"), *folders[:1] * 2, *options])
    assert done.exit_code == 2
    assert "give two artifacts or more, each of them once" in done.output
