"""A simulation asks the policy's probes as a gateway does: words first, the encoder for what they leave open."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.in_order import InOrder
from probes.runtime import EncoderProbe
from probes.static import StaticProbe
from probes.static_fit import fit_static, write_static
from probes.table import Table
from routers.load import parse
from routers.types import Signals

POLICY = """
version: 1
providers:
  p: {base_url: "http://127.0.0.1:9/v1"}
models:
  cheap: {provider: p, model: m, price: {input: $1/Mtok, output: $1/Mtok}}
  dear: {provider: p, model: n, price: {input: $10/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: PROBE, heads: {cheap: weak, dear: strong}}
routes:
  - {name: auto, when: {model: auto}, candidates: [cheap, dear], subject_to: {p_success: ">= 0.6"}}
"""
KNOWN, OTHER = "What is 15 plus 26?", "请问有多少种不同的放法?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `words`, a static probe of sums, which the weak model can do, and essays, which it cannot."""
    rng = np.random.default_rng(0)
    sums = [f"What is {a} plus {b}?" for a, b in rng.integers(10, 99, (60, 2))]
    essays = [f"Write essay number {i} on empire {i * 7}." for i in range(60)]
    labels = np.column_stack([[1.0] * 58 + [0.0] * 60 + [1.0] * 2, [1.0] * 57 + [0.0] * 3 + [1.0] * 57 + [0.0] * 3])
    table = Table(sums + essays, labels, ("weak", "strong"), ("w", "s"))
    made = tmp_path_factory.mktemp("policy")
    write_static(fit_static(table, answers=1.0), table, made / "words", "words")
    return made


HEADS = {"cheap": "weak", "dear": "strong"}


def asked(folder: Path, probe: str) -> tuple[InOrder, list[Signals]]:
    found = InOrder.of(parse(POLICY.replace("PROBE", probe)), folder)
    return found, found.sound([[{"role": "user", "content": text}] for text in (KNOWN, OTHER)], HEADS)


def p_of(signals: Signals) -> dict[str, float]:
    return {HEADS[model]: estimate.value for model, estimate in signals.p_success.items()}


def test_words_answer_and_what_they_leave_open_is_the_encoders(folder: Path) -> None:
    static, dense = StaticProbe.load(folder / "words"), EncoderProbe.load()
    probe, (known, other) = asked(folder, "[./words, default]")
    assert probe.version == f"{static.version}+{dense.version}"
    assert p_of(known) == static.read(KNOWN).p_success
    (encoded,) = dense.probe([[{"role": "user", "content": OTHER}]])
    assert p_of(other) == pytest.approx({head: encoded[head] for head in ("weak", "strong")}, abs=1e-5)
    alone, (_, open_) = asked(folder, "./words")
    assert alone.version == static.version
    assert (open_.probe, open_.p_success) == ("unavailable", {})


def test_what_nobody_answers_is_absent_and_not_zero(folder: Path, tmp_path: Path) -> None:
    (folder / "policy.yaml").write_text(POLICY.replace("PROBE", "./words"))
    rows = [KNOWN.replace("15", str(i)) for i in range(11, 41)] + [f"{OTHER} {i * 'x'}" for i in range(10)]
    table = tmp_path / "t.parquet"
    pd.DataFrame({"prompt": rows, "w": 1, "s": 1}).to_parquet(table)
    arguments = ["--model", "cheap=w", "--model", "dear=s", "--json", str(tmp_path / "o.json")]
    done = CliRunner().invoke(app, ["simulate", str(folder / "policy.yaml"), str(table), *arguments])
    assert done.exit_code == 0, done.output
    assert "p_success is not known" in done.output.replace("\n", " ")
