"""Every kind of artifact goes through `leadline probe fit, score, eval, certify, compare`: words and tables, too."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
import typer
from typer.testing import CliRunner

from gateway.cli import app as gateway_app
from gateway.found import Found
from gateway.score import score
from gateway.tiers import problems
from probes.artifact import read
from probes.certify import to_last
from probes.cluster_table import ClusterTable
from probes.commands import app as probe_app
from probes.errors import ArtifactError
from probes.manifest import ARTIFACTS, artifact_folder, bands_of, read_manifest, version_of
from probes.runtime import EncoderProbe
from probes.scored import opened, scored
from probes.static import StaticProbe
from probes.table import read_table
from probes.types import Estimate, Reading, interval
from routers.load import parse

HEADS = ["--prompt", "q", "--head", "weak=cheap", "--head", "strong=dear"]
UNREAD = ["请问有多少种不同的放法", "この本は何ページありますか", "오늘 날씨가 어떻습니까", "Какой сегодня день недели"]
TIERED = """
version: 1
providers: {p: {base_url: "http://127.0.0.1:9/v1"}}
models:
  cheap: {provider: p, model: m, price: {input: $1/Mtok, output: $1/Mtok}}
  dear: {provider: p, model: n, price: {input: $10/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: PROBES, heads: {cheap: weak, dear: strong}}
routes:
  - {name: auto, when: {model: auto}, candidates: [cheap, dear], subject_to: {p_success: ">= 0.6"}}
"""

app = typer.Typer()
app.add_typer(probe_app)
app.command()(score)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def questions(seed: int) -> pd.DataFrame:
    """Sums, which both models get right mostly, and essays, which the strong one does."""
    rng = np.random.default_rng(seed)
    sums = [f"What is {a} plus {b}?" for a, b in rng.integers(10, 999, (70, 2))]
    essays = [f"Write essay number {a} on the fall of empire {b}." for a, b in rng.integers(10, 999, (70, 2))]
    dear = (rng.random(140) < 0.9).astype(float)
    cheap = np.where(np.arange(140) < 70, rng.random(140) < 0.9, rng.random(140) < 0.1).astype(float)
    tokens = np.where(np.arange(140) < 70, 10, 300) + rng.integers(0, 5, 140)
    return pd.DataFrame({"q": sums + essays, "cheap": cheap, "dear": dear, "length": tokens})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `seen` and `fresh` tables, and what was fitted on the first: `words`, and `table`, of clusters."""
    made = tmp_path_factory.mktemp("tiers")
    questions(1).to_parquet(made / "seen.parquet")
    fresh = questions(2)
    strange = pd.DataFrame({"q": UNREAD, "cheap": [0.0] * 4, "dear": [1.0] * 4, "length": [9] * 4})
    pd.concat([fresh, strange], ignore_index=True).to_parquet(made / "fresh.parquet")
    seen, report = str(made / "seen.parquet"), str(made / "words.html")
    run("fit", seen, *HEADS, "--tier", "static", "--out", str(made / "words"), "--report", report)
    run("fit", seen, *HEADS, "--clusters", "8", "--tokens", "weak=length", "--out", str(made / "table"))
    return made


def test_words_are_measured_and_what_they_do_not_read_is_told(folder: Path) -> None:
    told, page = folder / "told.json", folder / "eval.html"
    artifacts = [str(folder / "words"), str(folder / "table")]
    run("eval", str(folder / "fresh.parquet"), *artifacts, *HEADS, "--json", str(told), "--report", str(page))
    rows = {(row["name"].partition("@")[0], row["metric"]): row["value"] for row in json.loads(told.read_text())}
    version = opened(folder / "words").version
    of_weak = {row["metric"]: row["value"] for row in json.loads(told.read_text()) if row["name"] == f"{version}: weak"}
    assert of_weak["abstains"] == pytest.approx(4 / 144)
    assert of_weak["n"] == 140
    assert of_weak["AUC"] > 0.8
    assert rows["table", "APGR"] > 0.6
    assert "Whether its numbers are true" in page.read_text()
    assert "Whether its numbers are true" in (folder / "words.html").read_text()


def test_rows_that_a_probe_says_nothing_of_prove_nothing(folder: Path, tmp_path: Path) -> None:
    pd.DataFrame({"q": UNREAD * 60, "cheap": [0.0, 1.0] * 120, "dear": [1.0] * 240}).to_parquet(tmp_path / "t.parquet")
    before = read_manifest(folder / "words").certificates
    done = CliRunner().invoke(
        app, ["certify", str(folder / "words"), str(tmp_path / "t.parquet"), *HEADS, "--alpha", "0.2"]
    )
    assert done.exit_code == 2
    assert "abstains from all 240 rows" in done.output
    assert read_manifest(folder / "words").certificates == before


def test_piped_tables_hold_every_number(folder: Path) -> None:
    """A pipe has no width: nothing is cut, folded or replaced by an ellipsis."""
    out = run("compare", str(folder / "fresh.parquet"), str(folder / "words"), str(folder / "table"), *HEADS)
    rows = [line for line in out.splitlines() if re.search(r"[+-]0\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]", line)]
    assert len(rows) == 11, "Brier, ECE and AUC of each head, three of routing, two of their certificates"
    assert "…" not in out


def test_shipped_artifacts_go_by_their_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert artifact_folder("static") == ARTIFACTS / "static"
    assert artifact_folder(str(folder / "words")) == folder / "words"
    with pytest.raises(ArtifactError, match="or one that ships: default, "):
        opened(artifact_folder("mine"))
    fresh = str(folder / "fresh.parquet")
    out = run("eval", fresh, "static", *HEADS)
    assert "static@" in out
    done = CliRunner().invoke(app, ["certify", "static", fresh, *HEADS, "--alpha", "0.2"])
    assert done.exit_code == 2
    assert "static ships with Leadline" in done.output
    (tmp_path / "static").mkdir()
    assert artifact_folder("static") == Path("static"), "a folder that is here goes first"


def test_a_probe_says_how_well_it_is_known_and_explain_shows_it(folder: Path) -> None:
    manifest = read_manifest(folder / "words")
    known = bands_of(manifest)
    assert set(known) == {"weak", "strong"}
    stripped = manifest.model_copy(
        update={"heads": tuple(head.model_copy(update={"bands": ()}) for head in manifest.heads)}
    )
    assert version_of(stripped, b"") == version_of(manifest, b""), "what is only said of it does not make it another"
    (folder / "words.yaml").write_text(TIERED.replace("PROBES", "./words"))
    prompt = questions(1)["q"][0]  # of words that the probe has seen
    done = CliRunner().invoke(gateway_app, ["explain", str(folder / "words.yaml"), prompt])
    assert done.exit_code == 0, done.output
    p = opened(folder / "words").read(prompt).p_success["weak"]  # type: ignore[union-attr]
    found = interval(known["weak"], p)
    assert found is not None
    assert f"P(success) {p:.2f} ({found[0]:.2f} to {found[1]:.2f}) by words@" in done.output


def test_every_kind_of_head_is_used_and_explained(folder: Path, tmp_path: Path) -> None:
    """Lengths in what answers cost, domains in what is explored, and whether thinking pays in how much is thought."""
    seen = questions(3).assign(kind=["sums"] * 70 + ["essays"] * 70)
    seen["without"], seen["thought"] = np.repeat([1.0, 0.0], 70), 1.0  # sums are right without a thought
    seen.to_parquet(tmp_path / "seen.parquet")
    heads = [*HEADS, "--tokens", "weak=length", "--domain", "kind", "--reasoning", "without,thought"]
    run("fit", str(tmp_path / "seen.parquet"), *heads, "--tier", "static", "--out", str(tmp_path / "words"))
    file = tmp_path / "policy.yaml"
    text = TIERED.replace("PROBES", "./words").replace("model: m,", "model: m, thinking: {field: reasoning_effort},")
    file.write_text(text.replace('subject_to: {p_success: ">= 0.6"}', "effort: auto, explore: {share: 5%}"))

    def told(prompt: str) -> str:
        done = CliRunner().invoke(gateway_app, ["explain", str(file), prompt])
        assert done.exit_code == 0, done.output
        return done.output

    sums, essays = told(seen.q[1]), told(seen.q[101])
    assert re.search(r"^domain: sums 0\.[5-9]\d", sums, re.MULTILINE)
    assert re.search(r"^domain: essays 0\.[5-9]\d", essays, re.MULTILINE)
    pays = [float(re.findall(r"^thinking pays: (\d\.\d\d)", one, re.MULTILINE)[0]) for one in (sums, essays)]
    assert pays[0] < 0.5 < pays[1]
    about = re.compile(r"^answer of cheap: about (\d+) tokens \(", re.MULTILINE)
    assert int(about.findall(sums)[0]) < 100 < int(about.findall(essays)[0])
    assert "cheap+none, by route auto" in sums
    assert "cheap+high, by route auto" in essays
    assert "thinks at most 8192 tokens (effort high)" in essays
    costs = [re.findall(r"cheap .* (\$\S+) expected \(", one)[0] for one in (sums, essays)]
    assert float(costs[0][1:]) < float(costs[1][1:]), "a longer answer costs more"


def test_two_tiers_that_are_averaged_err_between_them() -> None:
    first, second = Reading({"weak": 0.4}, frozenset({"weak"})), Reading({"weak": 0.8})
    found = Found({"cheap": "weak"})
    found.add(first, "a@1", 0, bands={"weak": ((0.5, 0.3, 0.5), (1.0, 0.6, 0.9))})
    assert found.p_success["cheap"] == Estimate(0.4, "a@1/weak", 0.3, 0.5)
    found.add(second, "b@1", 0, beside=True, bands={"weak": ((1.0, 0.5, 0.7),)})
    one = found.p_success["cheap"]
    assert (one.value, one.low, one.high) == pytest.approx((0.6, 0.4, 0.65))  # of 0.5 to 0.8, which holds its word
    unknown = Found({"cheap": "weak"})
    unknown.add(second, "b@1", 0)
    assert unknown.p_success["cheap"] == Estimate(0.8, "b@1/weak")


def test_who_says_nothing_of_a_row_leaves_it_to_the_last(folder: Path) -> None:
    probe = opened(folder / "words")
    assert isinstance(probe, StaticProbe)
    data = read_table(folder / "fresh.parquet", "q", {"weak": "cheap", "strong": "dear"})
    said = scored(data, probe)
    assert np.isnan(said[140:]).all()
    assert not np.isnan(said[:140]).any()
    np.testing.assert_array_equal(to_last(said)[140:], [[0.0, 1.0]] * 4)
    np.testing.assert_array_equal(to_last(said[:, :1])[140:], [[0.0]] * 4)
    assert probe.manifest.certificates, "fitted on rows with both labels, so certified out of fold"
    out = run("certify", str(folder / "words"), str(folder / "fresh.parquet"), *HEADS, "--alpha", "0.2")
    assert "abstains from 4 rows, which stay with the last head" in out
    found = read_manifest(folder / "words").certificate_for(0.2, method="ltt")
    assert found is not None
    assert found.n == 144
    lost = to_last(said)
    kept = lost[:, 0] - lost[:, 1] > found.threshold
    assert found.risk == pytest.approx(float((kept & (data.labels[:, 1] > data.labels[:, 0])).mean()))
    assert not kept[140:].any()


def test_kinds_of_artifacts_are_compared_on_the_rows_that_both_read(folder: Path) -> None:
    told = folder / "compared.json"
    both = [str(folder / "words"), str(folder / "table")]
    run("compare", str(folder / "fresh.parquet"), *both, *HEADS, "--json", str(told))
    measures = {one["measure"]: one["values"] for one in json.loads(told.read_text())["measures"]}
    assert all(np.isfinite(values).all() for values in measures.values())
    data = read_table(folder / "fresh.parquet", "q", {"weak": "cheap", "strong": "dear"})
    p = scored(data, opened(folder / "table"))[:140, 0]
    assert measures["weak: Brier"][1] == pytest.approx(float(((p - data.labels[:140, 0]) ** 2).mean()))


def test_a_table_of_clusters_is_an_artifact_that_an_engine_reads(folder: Path) -> None:
    artifact = read(folder / "table")
    assert isinstance(artifact.heads, ClusterTable)
    assert artifact.manifest.clusters is not None
    assert artifact.manifest.clusters.count == len(artifact.heads.centres) <= 8
    (sums, essays) = EncoderProbe.load(folder / "table").sound(
        [[{"role": "user", "content": text}] for text in ("What is 15 plus 26?", "Write an essay on the fall of Rome.")]
    )
    assert sums.p_success["weak"] > 0.6 > 0.4 > essays.p_success["weak"]
    assert sums.out_tokens["weak"][0] < 100 < 200 < essays.out_tokens["weak"][0]
    low, high = (essays.out_tokens["weak"][i] for i in (1, 2))
    assert low <= essays.out_tokens["weak"][0] <= high


def test_a_policy_names_a_table_of_clusters_like_any_probe(folder: Path) -> None:
    text = TIERED.replace("PROBES", "./table")
    (folder / "policy.yaml").write_text(text)
    assert problems(parse(text), folder, {}) == []
    out = folder / "out.parquet"
    fresh, policy = str(folder / "fresh.parquet"), str(folder / "policy.yaml")
    run("score", fresh, "--column", "q", "--out", str(out), "--policy", policy)
    decisions = parquet.read_table(out).column("decision").to_pylist()
    assert decisions[:70].count("cheap") > 60
    assert decisions[70:140].count("dear") > 60


def test_a_damaged_table_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "table" / "probe.json").read_text())
    manifest["clusters"]["count"] += 1
    (tmp_path / "probe.json").write_text(json.dumps(manifest))
    (tmp_path / "probe.safetensors").write_bytes((folder / "table" / "probe.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="centres is float32"):
        read(tmp_path)


def test_clusters_belong_to_the_encoder(folder: Path) -> None:
    arguments = ["fit", str(folder / "seen.parquet"), *HEADS, "--tier", "static", "--clusters", "8", "--out", "x"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "--clusters 8: belongs to --tier encoder; leave it out for static" in done.output
