"""`leadline probe fit` and `eval`, end to end on a small table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from probes.cli import app
from probes.errors import TableError
from probes.manifest import read_manifest
from probes.runtime import EncoderProbe
from probes.scored import opened, scored
from probes.table import read_table
from probes.text import render

ARGUMENTS = ["--prompt", "question", "--head", "weak=cheap", "--head", "strong=dear"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_fit_then_eval(sums_and_essays: pd.DataFrame, tmp_path: Path, kind: str) -> None:
    table = tmp_path / f"outcomes.{kind}"
    sums_and_essays.to_parquet(table) if kind == "parquet" else sums_and_essays.to_csv(table, index=False)
    out, rows_file = tmp_path / "sums", tmp_path / "rows.json"
    options = ["--drop-if", "bad", "--group-column", "kind", "--out", str(out), "--json", str(rows_file)]
    done = CliRunner().invoke(app, ["fit", str(table), *ARGUMENTS, *options])
    assert done.exit_code == 0, done.output
    rows = {(row["name"], row["metric"]): row for row in json.loads(rows_file.read_text())}
    assert rows["probe: weak", "n"]["value"] == 78
    assert rows["probe", "APGR"]["value"] > 0.7
    assert {"random", "prompt length", "group prior", "TF-IDF + LR (gap)", "oracle"} <= {name for name, _ in rows}
    assert ("probe, groups held out", "APGR") in rows

    certificates = read_manifest(out).certificates
    # 78 rows are too few for 0.02, and for 0.05 with confidence; what the folds prove is stored.
    assert [(one.alpha, one.method, one.rows) for one in certificates] == [
        (0.02, "crc", "out_of_fold"), (0.05, "crc", "out_of_fold"), (0.1, "ltt", "out_of_fold"),
        (0.1, "crc", "out_of_fold"),
    ]  # fmt: skip
    assert read_manifest(out).seen(sums_and_essays["question"][:50]) == 50
    probe = EncoderProbe.load(out)
    assert probe.heads == ("weak", "strong")
    easy, hard = probe.probe([[{"content": "What is 5 plus 6?"}], [{"content": "Write an essay on empire 9."}]])
    assert easy["weak"] > 0.5 > hard["weak"]

    done = CliRunner().invoke(app, ["eval", str(table), str(out), *ARGUMENTS, "--drop-if", "bad"])
    assert done.exit_code == 0, done.output
    assert "was fitted on some of these prompts" in done.output
    part = table.with_name("part.parquet")
    sums_and_essays.head(50).to_parquet(part)
    done = CliRunner().invoke(app, ["eval", str(part), str(out), *ARGUMENTS])
    assert "was fitted on some of these prompts" in done.output, "another table, the same prompts"


def test_a_complaint_names_the_row_of_the_file_and_not_its_index(sums_and_essays: pd.DataFrame, tmp_path: Path) -> None:
    table = tmp_path / "outcomes.parquet"
    sums_and_essays.loc[30, "cheap"] = 7
    sums_and_essays.set_index(np.arange(7000, 7080)).to_parquet(table)
    with pytest.raises(TableError, match="holds 7 in row 30 "):
        read_table(table, "question", {"weak": "cheap"})


def test_groups_are_recognised_where_asked_for(sums_and_essays: pd.DataFrame, tmp_path: Path) -> None:
    table, out = tmp_path / "outcomes.parquet", tmp_path / "kinds"
    sums_and_essays.replace({"kind": {"algebra": "sum", "letter": "essay"}}).to_parquet(table)
    asked = ["fit", str(table), *ARGUMENTS, "--recognise", "--out", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert "--recognise: needs --group-column" in done.output
    done = CliRunner().invoke(app, [*asked, "--group-column", "kind"])
    assert done.exit_code == 0, done.output
    assert read_manifest(out).groups == ("essay", "sum")
    easy, hard = EncoderProbe.load(out).probe([[{"content": "What is 5 plus 6?"}], [{"content": "Write essay 9."}]])
    assert easy["weak"] > 0.8
    assert hard["weak"] < 0.2
    done = CliRunner().invoke(app, ["eval", str(table), str(out), *ARGUMENTS])
    assert done.exit_code == 0, done.output


def test_each_kind_with_labels_enough_gets_a_probe_of_its_own(tmp_path: Path) -> None:
    questions = [f"What is {a} plus {b}{'' if a > 9 else ' hundred'}?" for a in range(19) for b in range(20)]
    right = [float("hundred" not in question) for question in questions]
    essays = [f"Write an essay about number {at}." for at in range(40)]
    table, out = tmp_path / "outcomes.parquet", tmp_path / "kinds"
    kinds = ["sum"] * len(questions) + ["essay"] * len(essays)
    pd.DataFrame({"question": questions + essays, "cheap": right + [0.0] * 40, "source": kinds}).to_parquet(table)
    asked = ["fit", str(table), *ARGUMENTS[:4], "--experts", "source", "--out", str(out)]
    done = CliRunner().invoke(app, [*asked, "--tier", "static"])
    assert done.exit_code == 2
    assert "--experts source: belongs to --tier encoder" in done.output
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert [(one.kind, one.heads) for one in read_manifest(out).experts] == [("essay", ()), ("sum", ("weak",))]
    asks = ["What is 15 plus 6?", "What is 5 plus 6 hundred?", "Write an essay about number 7."]
    easy, hard, essay = EncoderProbe.load(out).probe([[{"content": text}] for text in asks])
    assert easy["weak"] > 0.8
    assert max(hard["weak"], essay["weak"]) < 0.2


def test_the_same_seed_gives_the_same_version(sums_and_essays: pd.DataFrame, tmp_path: Path) -> None:
    table = tmp_path / "outcomes.parquet"
    sums_and_essays.to_parquet(table)
    versions = []
    for folder in ("first", "second"):
        run = ["fit", str(table), *ARGUMENTS, "--name", "twice", "--out", str(tmp_path / folder)]
        assert CliRunner().invoke(app, run).exit_code == 0
        versions.append(EncoderProbe.load(tmp_path / folder).version)
    assert versions[0] == versions[1]


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({}, ["--head", "other=nowhere"], "no column 'nowhere' for --head other; it has question, cheap"),
        ({}, ["--drop-if", "nowhere"], "no column 'nowhere' for --drop-if"),
        ({"cheap": 0.5}, [], "column 'cheap' holds 0.5 in row 0 (the first is row 0); labels are 0 or 1"),
        ({"cheap": "yes"}, [], "column 'cheap' holds 'yes' in row 0"),
        ({"cheap": np.nan}, [], "column 'cheap' holds no label for head 'weak'"),
        ({"question": None}, [], "column 'question' is empty in row 0"),
        ({"question": " "}, [], "column 'question' is empty in row 0"),
        ({"bad": True}, ["--drop-if", "bad"], "0 usable rows"),
        ({}, ["--head", "weak"], "write --head NAME=COLUMN"),
        ({}, ["--head", "weak=dear"], "given twice"),
        ({}, ["--encoder", "."], "no model.safetensors"),
    ],
)
def test_bad_input_says_what_to_do(
    sums_and_essays: pd.DataFrame, tmp_path: Path, change: dict[str, object], options: list[str], complaint: str
) -> None:
    table = tmp_path / "outcomes.csv"
    sums_and_essays.assign(**change).to_csv(table, index=False)
    done = CliRunner().invoke(app, ["fit", str(table), *ARGUMENTS, *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_an_unreadable_table_is_named(tmp_path: Path) -> None:
    for name, complaint in [("table.txt", "unknown table type '.txt'"), ("table.parquet", "cannot be read")]:
        (tmp_path / name).write_text("nothing")
        done = CliRunner().invoke(app, ["fit", str(tmp_path / name), *ARGUMENTS, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert complaint in done.output


def test_a_conversation_is_read_whole_as_a_gateway_reads_it(tmp_path: Path) -> None:
    talk = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Prove it."), ("assistant", "How?"))
    ]
    frame = pd.DataFrame({"talk": [talk] * 10 + [talk[1:]] * 10, "number": [7] * 20, "right": [0, 1] * 10})
    frame.to_parquet(tmp_path / "nested.parquet")
    frame.assign(talk=frame["talk"].map(json.dumps), number="007").to_csv(tmp_path / "t.csv", index=False)
    for name in ("nested.parquet", "t.csv"):
        table = read_table(tmp_path / name, "talk", {"weak": "right"})
        assert table.prompts == [render(talk)] * 10 + ["How?"] * 10
    assert read_table(tmp_path / "t.csv", "number", {"weak": "right"}).prompts == ["007"] * 20


@pytest.mark.parametrize("tier", ["static", "encoder"])
def test_labels_of_one_class_are_a_warning_and_a_base_rate(tmp_path: Path, tier: str) -> None:
    table, out = tmp_path / "t.parquet", tmp_path / "one"
    questions = [f"What is {i} plus {i * 3}?" for i in range(40)]
    pd.DataFrame({"question": questions, "cheap": 1, "dear": 1}).to_parquet(table)
    done = CliRunner().invoke(app, ["fit", str(table), *ARGUMENTS, "--tier", tier, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "warning: head 'weak' has only labels of 1: it learns nothing" in done.output
    data = read_table(table, "question", {"weak": "cheap"})
    assert scored(data, opened(out)) == pytest.approx(np.full((40, 1), 41 / 42), abs=0.03)


def test_a_path_that_cannot_be_written_is_named(sums_and_essays: pd.DataFrame, tmp_path: Path) -> None:
    table, file = tmp_path / "outcomes.parquet", tmp_path / "file"
    sums_and_essays.to_parquet(table)
    file.touch()
    fit = ["fit", str(table), *ARGUMENTS, "--tier", "static"]
    for options in (["--out", str(file)], ["--out", str(tmp_path / "x"), "--json", str(tmp_path / "no" / "x.json")]):
        done = CliRunner().invoke(app, [*fit, *options])
        assert done.exit_code == 2, done.output
        assert f"error: {options[-1]}: " in done.output
