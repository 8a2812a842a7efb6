"""The `static` tier: fitted on a table, read by the standard library alone, silent where it knows nothing."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from typer.testing import CliRunner

from probes.artifact import read
from probes.calibrate import ece, sigmoid
from probes.cli import app
from probes.errors import ArtifactError
from probes.manifest import ARTIFACTS, MANIFEST
from probes.sparse import SparseProbeClassifier
from probes.static import BUCKETS, MAX_CHARS, StaticProbe, words_of
from probes.static_fit import TextFeatures, fit_static, write_static
from probes.table import Table, read_table
from probes.text import render
from probes.train import undecided

ARGUMENTS = ["--prompt", "question", "--head", "weak=cheap", "--head", "strong=dear", "--tier", "static"]
SUM, ESSAY = "What is 15 plus 26?", "Write essay number 9 on the causes of the fall of empire 63."


@pytest.fixture(scope="module")
def table() -> Table:
    """Sums, of which a model gets the short ones right, and essays, which only the strong one can write."""
    rng = random.Random(3)
    prompts, weak, strong, tokens, kinds = [], [], [], [], []
    for at in range(240):
        terms = rng.randrange(2, 9)
        if at % 2:
            prompts.append("What is " + " plus ".join(str(rng.randrange(2, 99)) for _ in range(terms)) + "?")
            weak.append(float(rng.random() < 1.1 - 0.12 * terms))
            strong.append(float(rng.random() < 0.95))
            tokens.append(4.0 * terms * rng.uniform(0.8, 1.25))
        else:
            prompts.append(f"Write essay number {at} on the causes of the fall of empire {at * 7}.")
            weak.append(float(rng.random() < 0.1))
            strong.append(float(rng.random() < 0.8))
            tokens.append(300.0 * rng.uniform(0.8, 1.25))
        kinds.append("sum" if at % 2 else "essay")
    frame = pd.DataFrame({"q": prompts, "w": weak, "s": strong, "t": tokens, "kind": kinds, "off": weak, "on": strong})
    return _table(frame)


def _table(frame: pd.DataFrame) -> Table:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        frame.to_parquet(path)
        return read_table(
            path, "q", {"weak": "w", "strong": "s"}, tokens={"weak": "t"}, domain="kind", reasoning=("off", "on")
        )


@pytest.fixture(scope="module")
def folder(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static")
    write_static(fit_static(table), table, out, "sums")
    return out


@pytest.fixture(scope="module")
def probe(folder: Path) -> StaticProbe:
    return StaticProbe.load(folder)


@parametrize_with_checks(  # type: ignore[untyped-decorator]
    [SparseProbeClassifier()],
    expected_failed_checks=lambda _: {
        "check_supervised_y_2d": "a column of labels means one head, not a vector to be ravelled"
    },
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_heads_learn_from_their_own_rows_and_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 8))
    p = sigmoid(np.column_stack([X[:, 0] + X[:, 1], X[:, 2] - 1]))
    y = (rng.random(p.shape) < p).astype(float)
    y[2000:, 1] = np.nan
    model = SparseProbeClassifier().fit(X, y)
    assert np.abs(model.predict_proba(X) - p).mean() < 0.03
    assert ece(model.oof_[:, 0], y[:, 0]) < 0.04
    assert np.isnan(model.oof_[2000:, 1]).all()
    wrong = np.where(np.isnan(y), 1.0, y)
    assert np.abs(SparseProbeClassifier().fit(X, wrong).predict_proba(X)[:, 1] - p[:, 1]).mean() > 0.1


def test_the_worker_reads_as_the_estimator_does(table: Table, probe: StaticProbe) -> None:
    features = TextFeatures().fit(table.prompts)
    X = features.transform(table.prompts)
    expected = SparseProbeClassifier().fit(X, table.labels[:, :2]).predict_proba(X)
    said = [probe.read(prompt) for prompt in table.prompts]
    got = np.array([[reading.p_success["weak"], reading.p_success["strong"]] for reading in said if reading.p_success])
    kept = np.array([bool(reading.p_success) for reading in said])
    assert kept.mean() > 0.98  # all but what is strange even here
    np.testing.assert_allclose(got, expected[kept], atol=0.02)  # tables of bytes


def test_every_kind_of_head_says_what_it_was_taught(probe: StaticProbe) -> None:
    easy, hard = probe.read(SUM), probe.read(ESSAY)
    assert easy.p_success["weak"] > 0.5 > 0.3 > hard.p_success["weak"]
    tokens, low, high = hard.out_tokens["weak"]
    assert 200 < low < tokens < high < 450
    assert easy.out_tokens["weak"][0] < 60
    assert hard.domain["essay"] > 0.9 > easy.domain["essay"]
    assert sum(hard.domain.values()) == pytest.approx(1)
    assert easy.needs_reasoning is not None
    assert hard.needs_reasoning is not None
    assert hard.needs_reasoning > easy.needs_reasoning + 0.2


def test_it_leaves_to_others_what_it_does_not_know(table: Table, probe: StaticProbe) -> None:
    said = [reading for reading in map(probe.read, table.prompts) if reading.p_success]
    low, high = probe.manifest.heads[0].undecided or (0.0, 0.0)
    assert low < np.mean(table.column("weak")) < high
    inside = [reading.p_success["weak"] for reading in said if "weak" in reading.undecided]
    outside = [reading.p_success["weak"] for reading in said if "weak" not in reading.undecided]
    assert 0.2 < len(inside) / len(said) < 0.8  # half of them, by default, out of fold
    assert all(low < p < high for p in inside)
    assert not any(low < p < high for p in outside)


def test_how_much_is_left_to_others_is_the_operators_choice() -> None:
    p = np.linspace(0.0, 1.0, 101)
    assert undecided(p, 1.0) is None
    assert undecided(p, 0.5) == pytest.approx((0.25, 0.75))
    assert undecided(p, 0.0) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "Wie viele verschiedene Wege gibt es, acht Türme aufzustellen? Begründe deine Antwort ausführlich.",
        "请问在一个八乘八的棋盘上放置八个车,使得它们互不攻击,有多少种不同的放法?",
        bytes(range(256)).decode("latin-1") * 3,
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=600)),
        "What is 5 plus 6? " * 100_000,
        "\ud800 lone \udfff surrogates",
    ],
    ids=["empty", "blank", "German", "Chinese", "binary", "gibberish", "huge", "surrogates"],
)
def test_it_abstains_rather_than_guesses(probe: StaticProbe, text: str) -> None:
    reading = probe.read(text)
    assert not reading.p_success
    assert not reading.out_tokens
    assert reading.needs_reasoning is None


@pytest.mark.parametrize(
    "suffix", ["!!!! zx}{ describing.] similarlyNow", " essay" * 30, " What is" * 200, "\x00" * 50]
)
def test_an_adversarial_suffix_gets_a_probability_or_nothing(probe: StaticProbe, suffix: str) -> None:
    for p in probe.read(SUM + suffix).p_success.values():
        assert 0 < p < 1


def test_what_is_read_of_a_huge_text_is_bounded() -> None:
    start, end = "first words ", " last words"
    words = words_of(start + "x " * 5_000_000 + end)
    assert len(words.places) < MAX_CHARS
    assert words_of(start).places <= words.places
    assert words_of(end).places <= words.places
    assert max(words.places) < BUCKETS


def test_the_whole_conversation_is_read(probe: StaticProbe) -> None:
    talk = [
        {"role": "user", "content": ESSAY},
        {"role": "assistant", "content": "Sure?"},
        {"role": "user", "content": "Yes"},
    ]
    assert words_of(ESSAY).places <= words_of(render(talk)).places


def test_fit_from_the_command_line(sums_and_essays: pd.DataFrame, tmp_path: Path) -> None:
    table, out, rows_file = tmp_path / "outcomes.csv", tmp_path / "words", tmp_path / "rows.json"
    sums_and_essays.assign(length=[5] * 40 + [200] * 40).to_csv(table, index=False)
    options = ["--tokens", "weak=length", "--domain", "kind", "--reasoning", "cheap,dear"]
    done = CliRunner().invoke(
        app, ["fit", str(table), *ARGUMENTS, *options, "--out", str(out), "--json", str(rows_file)]
    )
    assert done.exit_code == 0, done.output
    rows = {(row["name"], row["metric"]): row["value"] for row in json.loads(rows_file.read_text())}
    assert rows["probe", "APGR"] > 0.6
    assert rows["probe: weak.tokens", "log error"] < rows["constant: weak.tokens", "log error"] / 2
    assert rows["probe: domain", "accuracy"] > rows["constant: domain", "accuracy"]
    probe = StaticProbe.load(out)
    assert probe.version.startswith("words@")
    assert probe.heads[:3] == ("weak", "strong", "weak.tokens")
    assert sum(file.stat().st_size for file in out.iterdir()) < (len(probe.heads) + 1) * BUCKETS + 20_000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--reasoning", "cheap"], "write --reasoning WITHOUT,WITH"),
        (["--reasoning", "cheap,nowhere"], "no column 'nowhere' for --reasoning"),
        (["--tokens", "weak=question"], "lengths are tokens, 0 or more"),
        (["--domain", "nowhere"], "no column 'nowhere' for --domain"),
    ],
)
def test_bad_columns_are_named(
    sums_and_essays: pd.DataFrame, tmp_path: Path, options: list[str], complaint: str
) -> None:
    table = tmp_path / "outcomes.csv"
    sums_and_essays.to_csv(table, index=False)
    done = CliRunner().invoke(app, ["fit", str(table), *ARGUMENTS, *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"encoder_sha256": "0"}, "refit with `leadline probe fit --tier static`"),
        ({"tier": "encoder"}, "a static one is wanted"),
        ({"limits": {}}, "`limits` must state chars and rarity"),
        ({"tensors_sha256": "0"}, "does not match tensors_sha256"),
    ],
)
def test_damaged_and_foreign_artifacts_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"certificates": []} | change))
    with pytest.raises(ArtifactError, match=complaint):
        StaticProbe.load(tmp_path)


def test_hidden_states_are_not_read_with_weights_of_words(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="tier `static`"):
        read(folder)


def test_a_worker_reads_it_without_numpy(folder: Path) -> None:
    code = f"""
import sys
for name in ("numpy", "safetensors", "torch", "sklearn", "scipy", "pandas"):
    sys.modules[name] = None
from pathlib import Path
from probes.static import StaticProbe
print(StaticProbe.load(Path({str(folder)!r})).read({SUM!r}).p_success["weak"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.5


def test_the_shipped_probe_knows_sums_from_essays() -> None:
    folder = ARTIFACTS / "static"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 350_000
    probe = StaticProbe.load(folder)
    assert probe.heads == ("local", "weak", "strong")
    easy, other = probe.read("What is 12 + 7 - 4?"), probe.read("Which enzyme unwinds DNA during replication?")
    assert easy.p_success["local"] > 0.8 > 0.2 > other.p_success["local"]
