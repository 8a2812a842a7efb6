"""`leadline probe score`: any table, row by row, resumable, with a decision by certificate, threshold or policy."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as parquet
import pytest
import typer
from typer.testing import CliRunner, Result

from gateway.score import score
from probes.artifact import read
from probes.certify import issue
from probes.commands import app as probe_app
from probes.errors import TableError
from probes.manifest import Manifest, default_artifact_path, write_manifest
from probes.runtime import EncoderProbe
from probes.score import CHUNK, score_cells

ROOT = Path(__file__).parents[2]
TALK = [{"role": "user", "content": "Prove it."}, {"role": "assistant", "content": "How?"}]
POLICY = """
version: 1
providers:
  far: {base_url: "http://127.0.0.1:9/v1"}
models:
  small: {provider: far, model: any, context: 8000, price: {input: $0.25/Mtok, output: $2/Mtok}}
  large: {provider: far, model: any, context: 8000, price: {input: $1.25/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: default, heads: {small: weak, large: strong}}
routes:
  - name: auto
    when: {model: auto}
    candidates: [small, large]
    objective: cheapest
    subject_to: {p_success: ">= 0.75"}
    on_failure: [large]
"""

app = typer.Typer()
app.command()(score)


def run(table: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, [str(table), "--column", "prompt", "--out", str(out), *options])


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parquet.read_table(out).to_pylist()
    return found


def test_every_kind_of_cell_is_scored_or_says_why_not(tmp_path: Path) -> None:
    cells: list[tuple[bytes | None, str | None]] = [
        (b"What is 2 plus 3?", None),
        (None, "empty"),
        (b"  \n", "empty"),
        (b"\x89PNG\r\n\xff\xfe", "not UTF-8 at byte 0"),
        (b"x" * 3_000_000, None),
        ("Почему небо синее? 天为什么是蓝的?".encode(), None),
        (json.dumps(TALK).encode(), None),
        (json.dumps({"messages": TALK}).encode(), None),
        (b'[{"role": "user", "content": "\\ud800"}]', "not Unicode: a surrogate without its other half"),
        (b"[1, 2, 3]", None),
        (b"\x00\x01\x02", None),
    ]
    pd.DataFrame({"prompt": [cell for cell, _ in cells], "id": range(len(cells))}).to_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out.parquet"
    done = run(tmp_path / "t.parquet", out, "--keep", "id", "--threshold", "-0.2", "--json", str(tmp_path / "c.json"))
    assert done.exit_code == 0, done.output
    rows = rows_of(out)
    assert [row["reason"] for row in rows] == [reason for _, reason in cells]
    assert [row["id"] for row in rows] == [row["row"] for row in rows] == list(range(len(cells)))
    probe = EncoderProbe.load()
    for row, (cell, reason) in zip(rows, cells, strict=True):
        if reason is not None:
            assert (row["p_weak"], row["p_strong"], row["decision"]) == (None, None, "strong")
        else:
            assert row["decision"] == ("weak" if row["p_weak"] - row["p_strong"] > -0.2 else "strong")
            if cell is not None and cell[:1] not in (b"[", b"{"):
                (p,) = probe.probe([[{"role": "user", "content": cell.decode()}]])
                assert row["p_strong"] == pytest.approx(p["strong"], abs=1e-5)
    # The whole conversation counts, however it is written.
    (talk,) = probe.probe([TALK])
    assert rows[6]["p_weak"] == pytest.approx(talk["weak"], abs=1e-5)
    assert rows[7]["p_weak"] == pytest.approx(talk["weak"], abs=1e-5)
    lines = [line for line in done.output.splitlines() if line.startswith("    ")]
    assert sum(int(line.split()[0]) for line in lines) == len(cells), "each row is counted once"
    assert "         2  strong, not scored: empty" in lines
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["not_scored"]["empty"] == 2
    assert sum(told["decisions"].values()) == len(cells)
    assert json.loads(parquet.read_schema(out).metadata[b"leadline"])["probe"] == probe.version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "out.parquet", "t.parquet"]


def test_nested_conversations_csv_and_jsonl_are_read_alike(tmp_path: Path) -> None:
    pd.DataFrame({"prompt": [TALK, None]}).to_parquet(tmp_path / "nested.parquet")
    pd.DataFrame({"prompt": [json.dumps(TALK), None]}).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": TALK}) + "\n\n" + json.dumps({"prompt": None}) + "\n")
    found = []
    for name in ("nested.parquet", "t.csv", "t.jsonl"):
        done = run(tmp_path / name, tmp_path / f"{name}.parquet", "--threshold", "0")
        assert done.exit_code == 0, done.output
        found.append(rows_of(tmp_path / f"{name}.parquet"))
    assert found[0] == found[1] == found[2]
    assert found[0][0]["p_weak"] is not None
    assert found[0][1]["reason"] == "empty"


def certified(folder: Path) -> Manifest:
    """The shipped artifact with a certificate of its own making."""
    probe = read(default_artifact_path())
    p = EncoderProbe.load().probe([[{"content": f"What is {i} times {i + 1}?"}] for i in range(40)])
    scores = pd.DataFrame(p)[["weak", "strong"]].to_numpy()
    quality = pd.DataFrame({"weak": [0.0] * 20 + [1.0] * 20, "strong": 1.0}).to_numpy()
    one = issue(
        scores, quality, ("weak", "strong"), alpha=0.1, method="crc",
        rows="held_out", data_sha256="0", manifest=probe.manifest,
    )  # fmt: skip
    folder.mkdir()
    (folder / "probe.safetensors").write_bytes((default_artifact_path() / "probe.safetensors").read_bytes())
    manifest = probe.manifest.model_copy(update={"certificates": (one,)})
    write_manifest(manifest, folder)
    return manifest


def test_the_certificate_decides(tmp_path: Path) -> None:
    (one,) = certified(tmp_path / "probe").certificates
    prompts = [f"What is {i} times {i + 1}?" for i in range(30)]
    pd.DataFrame({"prompt": prompts}).to_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out.parquet"
    done = run(tmp_path / "t.parquet", out, "--probe", str(tmp_path / "probe"), "--at-most", "0.1")
    assert done.exit_code == 0, done.output
    assert str(one) in done.output
    rows = rows_of(out)
    assert [row["decision"] for row in rows] == [
        one.choose({"weak": row["p_weak"], "strong": row["p_strong"]}) for row in rows
    ]
    assert {row["decision"] for row in rows} == {"weak", "strong"}

    done = run(tmp_path / "t.parquet", out, "--probe", str(tmp_path / "probe"), "--at-most", "0.05")
    assert done.exit_code == 2
    assert "--at-most 0.05: the artifact 'default' has no such certificate, only 0.1 (crc)" in done.output


def test_a_policy_decides(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    prompts = ["What is 2 plus 3?", "Derive the Fokker-Planck equation for a jump process.", None]
    pd.DataFrame({"prompt": prompts}).to_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out.parquet"
    done = run(tmp_path / "t.parquet", out, "--policy", str(tmp_path / "policy.yaml"))
    assert done.exit_code == 0, done.output
    rows = rows_of(out)
    for row in rows[:2]:
        assert row["decision"] == ("small" if row["p_weak"] >= 0.75 else "large")
        assert row["rule"]
    assert rows[2]["reason"] == "empty"
    assert rows[2]["decision"] == "large"


def test_a_static_probe_scores_too_and_says_where_it_abstains(tmp_path: Path) -> None:
    easy = [f"What is {i} plus {i + 3}?" for i in range(30)]
    frame = pd.DataFrame(
        {"prompt": easy + [f"Write essay {i} on law." for i in range(30)], "weak": [1] * 30 + [0] * 30}
    )
    frame["strong"] = [0] + [1] * 59
    frame.to_csv(tmp_path / "train.csv", index=False)
    heads = ["--prompt", "prompt", "--head", "weak=weak", "--head", "strong=strong"]
    fit = ["fit", str(tmp_path / "train.csv"), *heads, "--tier", "static", "--out", str(tmp_path / "words")]
    assert CliRunner().invoke(probe_app, fit).exit_code == 0
    pd.DataFrame({"prompt": ["What is 7 plus 9?", "Ж" * 900]}).to_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out.parquet"
    done = run(tmp_path / "t.parquet", out, "--probe", str(tmp_path / "words"), "--threshold", "-0.2")
    assert done.exit_code == 0, done.output
    sum_, strange = rows_of(out)
    assert sum_["p_weak"] > 0.5
    assert sum_["decision"] == "weak"
    assert strange["reason"] == "the probe abstains: unlike what it was fitted on"
    assert (strange["p_weak"], strange["decision"]) == (None, "strong")


KILLED = """
import os, signal, typer
from gateway.score import score
from probes.runtime import EncoderProbe

probe, asked = EncoderProbe.probe, []

def last_words(self, conversations):
    asked.append(len(conversations))
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return probe(self, conversations)

EncoderProbe.probe = last_words
typer.run(score)
"""
"""It dies while it scores the third of its parts."""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    prompts = [f"Question {i}: what is {i} plus {i}?" for i in range(4 * CHUNK)]
    pd.DataFrame({"prompt": prompts}).to_parquet(tmp_path / "t.parquet")
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "t.parquet"), "--column", "prompt", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*command, "--threshold", "0"], env=environment, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    kept = {path.name for path in parts.glob("0*.json")}
    assert len(kept) == 2

    asked = Counting()
    scored = score_cells(prompts, asked, out, json_job(parts))
    assert asked.rows == (4 - len(kept)) * CHUNK
    assert len(scored) == len(prompts)
    for i in (0, len(prompts) - 1):
        (p,) = asked.probe([[{"role": "user", "content": prompts[i]}]])
        assert scored[i].p == pytest.approx(p, abs=1e-5)

    # Parts of another table are not used.
    other = Counting()
    assert len(score_cells(prompts[:1], other, out, {"table_sha256": "another"})) == 1
    assert other.rows == 1


def json_job(parts: Path) -> dict[str, str]:
    job = json.loads((parts / "job.json").read_text())
    return {name: job[name] for name in ("table", "table_sha256", "column")}


class Counting:
    """The shipped probe, and how many rows it was asked for."""

    def __init__(self) -> None:
        self.rows = 0
        self._probe = EncoderProbe.load()
        self.version, self.heads = self._probe.version, self._probe.heads

    def probe(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
        self.rows += len(conversations)
        return self._probe.probe(conversations)


def test_two_runs_do_not_write_one_result(tmp_path: Path) -> None:
    class Nested(Counting):
        def probe(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
            with pytest.raises(TableError, match="another run is writing it"):
                score_cells(["b"], Counting(), tmp_path / "out.parquet", {})
            return super().probe(conversations)

    assert len(score_cells(["a"], Nested(), tmp_path / "out.parquet", {})) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--keep", "nowhere"], "no column 'nowhere'; it has prompt, row"),
        (["--keep", "row"], "--keep row: the result has a column of that name"),
        (["--threshold", "0", "--head", "weak", "--head", "best"], "--head best: the artifact has local, weak, strong"),
        (["--threshold", "0", "--at-most", "0.1"], "--threshold and --at-most both decide"),
        (["--policy", "p.yaml", "--threshold", "0"], "--policy decides alone"),
        (["--policy", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--out", "out.csv"], "the result is a .parquet file"),
        (["--column", "nowhere"], "no column 'nowhere'"),
        (["--encoder", "."], "no model.safetensors"),
    ],
)
def test_bad_input_says_what_to_do(tmp_path: Path, options: list[str], complaint: str) -> None:
    pd.DataFrame({"prompt": ["a"], "row": [1]}).to_parquet(tmp_path / "t.parquet")
    done = run(tmp_path / "t.parquet", tmp_path / "out.parquet", *options)
    assert done.exit_code == 2
    assert complaint in done.output
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("t.parquet", b"nothing", "cannot be read"),
        ("t.txt", b"prompt\na\n", "unknown table type '.txt'"),
        ("t.jsonl", b"{", "cannot be read"),
        ("missing.csv", None, "no such file"),
        ("empty.csv", b"", "cannot be read"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, name: str, data: bytes | None, complaint: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    done = run(tmp_path / name, tmp_path / "out.parquet", "--threshold", "0")
    assert done.exit_code == 2
    assert complaint in done.output
