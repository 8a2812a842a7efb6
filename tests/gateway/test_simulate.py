"""`leadline simulate`: a policy over tables whose outcomes are known, beside baselines whose worth can be computed."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.simulate.baselines import baselines
from gateway.simulate.compare import compare
from gateway.simulate.routed import Routed, at_cost, play
from gateway.simulate.scores import probe_signals, score_file
from gateway.simulate.table import Array, Columns, Long, Outcomes, read_outcomes
from probes.errors import TableError
from probes.types import Estimate
from routers.types import Accept, Cascade, Signals, Single

DATA = Path(os.environ.get("LEADLINE_DATA", Path(__file__).parents[3] / "shared" / "data"))
POLICY = """
version: 1
providers:
  p: {base_url: "http://127.0.0.1:9/v1"}
models:
  weak: {provider: p, model: m, price: {input: $1/Mtok, output: $1/Mtok}}
  strong: {provider: p, model: n, price: {input: $10/Mtok, output: $10/Mtok}}
  third: {provider: p, model: o, price: {input: $100/Mtok, output: $100/Mtok}}
signals:
  difficulty: {probe: default, heads: {weak: weak, strong: strong}}
routes:
  - {name: auto, when: {model: auto}, candidates: [weak, strong, third], subject_to: {p_success: ">= 0.5"}}
"""
MODELS = ["--model", "weak=w:wc", "--model", "strong=s:sc"]
GIVEN = ["--p-success", "weak=pw", "--p-success", "strong=ps"]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def frame(n: int = 60) -> pd.DataFrame:
    """The weak model is right on even rows, the strong one on all but each tenth; the signal knows."""
    rows = np.arange(n)
    weak = (rows % 2 == 0).astype(float)
    return pd.DataFrame(
        {
            "prompt": [f"{'easy' if even else 'hard'} question number {i}" for i, even in enumerate(weak)],
            "task": np.where(weak > 0, "a", "b"),
            "w": weak,
            "s": (rows % 10 != 9).astype(float),
            "wc": 0.001,
            "sc": 0.01,
            "pw": np.where(weak > 0, 0.9, 0.1),
            "ps": 0.8,
        }
    )


def written(table: pd.DataFrame, folder: Path, name: str = "table.parquet") -> Path:
    path = folder / name
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)


def routers_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())["routers"]}


def test_the_policy_and_each_baseline_by_hand(policy: Path, tmp_path: Path) -> None:
    table, out, page = written(frame(), tmp_path), tmp_path / "out.json", tmp_path / "out.html"
    done = simulate(policy, table, *MODELS, *GIVEN, "--group", "task", "--json", out, "--report", page)
    assert done.exit_code == 0, done.output
    found = routers_of(out)
    # weak on its 30 right rows for $0.001, strong on the 30 others, of which 6 are wrong, for $0.01
    assert found["policy"]["accuracy"]["value"] == pytest.approx(54 / 60)
    assert found["policy"]["cost_usd_per_1000"]["value"] == pytest.approx(5.5)
    assert found["policy"]["share"] == {"weak": 0.5, "strong": 0.5}
    assert found["random"]["accuracy"]["value"] == pytest.approx((30 + 54) / 2 / 60)
    assert found["always weak: weak"]["accuracy"]["value"] == 0.5
    assert found["always strong, best single: strong"]["accuracy"]["value"] == 0.9
    assert found["oracle"]["accuracy"]["value"] == pytest.approx(54 / 60)
    # The oracle sends what nobody gets right to the cheaper model.
    assert found["oracle"]["cost_usd_per_1000"]["value"] == pytest.approx((36 * 0.001 + 24 * 0.01) / 60 * 1000)
    for name in ("group prior", "TF-IDF + LR", "k-means", "prompt length"):
        assert found[name]["cost_usd_per_1000"]["value"] == pytest.approx(5.5), name
    # The group and the first word say it all, out of fold too; at the policy's cost nobody can do better.
    assert found["group prior"]["accuracy"]["value"] == pytest.approx(54 / 60)
    assert found["TF-IDF + LR"]["accuracy"]["value"] == pytest.approx(54 / 60)
    saving = found["always strong, best single: strong"]["policy_cost_saving"]
    assert saving["value"] == pytest.approx(0.45)
    assert saving["low"] < 0.45 < saving["high"]
    html = page.read_text()
    assert html.count("<svg") == 1
    assert not re.search(r"https?://|<script|url\(", html)
    assert "not in the table, so never chosen: third" in done.output


def test_shares_and_schedules_hold_as_they_would(tmp_path: Path) -> None:
    routes = """routes:
  - {name: some, when: {model: auto, share: 30%}, use: [strong]}
  - {name: night, when: {model: auto, schedule: {hours: "22:00-06:00"}}, use: [strong]}
  - {name: rest, when: {model: auto}, use: [weak]}
"""
    policy, table, out = tmp_path / "p.yaml", written(frame(400), tmp_path), tmp_path / "out.json"
    policy.write_text(POLICY.split("signals:")[0] + routes)
    shares = {}
    for at in ("2026-11-01T12:00", "2026-11-01T23:00"):
        done = simulate(policy, table, *MODELS, "--at", at, "--json", out)
        assert done.exit_code == 0, done.output
        shares[at] = routers_of(out)["policy"]["share"]["strong"]
    assert 0.2 < shares["2026-11-01T12:00"] < 0.4
    assert shares["2026-11-01T23:00"] == 1.0


def test_the_long_form_says_the_same(policy: Path, tmp_path: Path) -> None:
    wide = frame()
    long = pd.concat(
        pd.DataFrame({"task": wide.task, "qid": wide.index, "by": name, "correct": wide[c], "usd": wide[u]})
        for name, c, u in (("W 7B", "w", "wc"), ("S", "s", "sc"), ("other", "s", "sc"))
    )
    queries = wide[["prompt", "task", "pw", "ps"]].assign(qid=wide.index)
    out, same = tmp_path / "long.json", tmp_path / "wide.json"
    options = ["--by", "by", "--query", "task,qid", "--cost", "usd", "--prompts", written(queries, tmp_path, "q.csv")]
    done = simulate(
        policy, written(long, tmp_path, "long.parquet"), "--model", "weak=W 7B", "--model", "strong=S",
        *options, *GIVEN, "--json", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert simulate(policy, written(wide, tmp_path), *MODELS, *GIVEN, "--json", same).exit_code == 0
    assert routers_of(out) == routers_of(same)


def test_a_router_compared_with_itself_gains_nothing() -> None:
    rng = np.random.default_rng(0)
    accuracy, cost = rng.random(50), rng.random(50)
    ours = Routed("policy", accuracy, cost, np.array([0.5, 0.5]))
    rows = compare(ours, [Routed("twin", accuracy, cost, np.array([0.5, 0.5]))], ["a", "b"])
    assert rows[1].gain == (0.0, 0.0, 0.0)
    assert rows[1].saving == (0.0, 0.0, 0.0)
    value, low, high = rows[0].accuracy
    error = float(accuracy.std()) / 50**0.5
    assert (low - value, high - value) == pytest.approx((-1.96 * error, 1.96 * error), rel=0.15)


def outcomes(correct: Array, cost: Array | None = None) -> Outcomes:
    names = tuple("abc"[: correct.shape[1]])
    return Outcomes([f"prompt {i}" for i in range(len(correct))], names, correct, cost, None, {}, None, 0)


def test_a_dial_spends_exactly_what_is_allowed() -> None:
    rng = np.random.default_rng(1)
    table = outcomes(rng.random((200, 3)), np.tile([1.0, 10.0, 100.0], (200, 1)))
    assert table.cost is not None
    quality = np.round(rng.random((200, 3)), 1)  # with ties, between which a threshold cannot choose
    for budget in (1.0, 7.3, 25.0):
        routed = at_cost("x", quality, table.cost.mean(0), table, table.cost, budget)
        assert routed.cost is not None
        assert routed.cost.mean() == pytest.approx(budget)


def test_nobody_beats_the_oracle_and_many_models_have_no_dial_without_costs() -> None:
    rng = np.random.default_rng(2)
    table = outcomes((rng.random((300, 3)) < (0.4, 0.6, 0.5)).astype(float))
    policy = Routed.of("policy", np.tile([0.2, 0.3, 0.5], (300, 1)), table, None)
    found = {router.name: router for router in baselines(table, None, policy)}
    best = found["oracle"].accuracy
    assert all((router.accuracy <= best + 1e-12).all() for router in found.values())
    assert best.mean() == pytest.approx(table.correct.max(1).mean())


def test_a_cascade_is_taken_at_what_its_rule_keeps() -> None:
    accept = Accept((), 0.0, 0.5, keeps_right=0.9, keeps_wrong=0.2)
    plan = Cascade((Single("a"), Single("b")), accept)
    answered = np.zeros(2)
    # a is right: kept at 0.9, else b, which is wrong. Cost: a always, b for the 0.1 that goes on.
    right = play(plan, {"a": 0, "b": 1}, np.array([1.0, 0.0]), np.array([[10.0, 100.0]]), 0, answered)
    assert right == pytest.approx((0.9, 20.0))
    assert answered == pytest.approx([0.9, 0.1])
    wrong = play(plan, {"a": 0, "b": 1}, np.array([0.0, 1.0]), np.array([[10.0, 100.0]]), 0, np.zeros(2))
    assert wrong == pytest.approx((0.8, 90.0))
    with pytest.raises(TableError, match=r"the policy chose b\+high; give its columns: --model b\+high=CORRECT"):
        play(Single("b", "high"), {"a": 0, "b": 1}, np.array([0.0, 1.0]), None, 0, np.zeros(2))


def test_agreement_is_taken_at_its_worst_where_all_are_wrong() -> None:
    plan = Cascade((Single("a"), Single("b", beside=True), Single("c")), Accept(agree=2))
    place, cost = {"a": 0, "b": 1, "c": 2}, np.array([[10.0, 20.0, 100.0]])

    def played(*correct: float) -> tuple[float, float]:
        return play(plan, place, np.array(correct), cost, 0, np.zeros(3))

    assert played(1, 1, 0) == (1.0, 30.0)
    assert played(1, 0, 1) == (1.0, 130.0)
    assert played(1, 0, 0) == (0.0, 130.0)
    assert played(0, 0, 1) == (0.0, 30.0), "the same wrong answer"


class Prober:
    """Counts what it is asked, and breaks at a given prompt."""

    version = "counting@1"

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked: list[str] = []
        self._breaks_at = breaks_at

    def sound(self, conversations: Sequence[Sequence[dict[str, str]]], heads: Mapping[str, str]) -> list[Signals]:
        texts = [conversation[0]["content"] for conversation in conversations]
        if self._breaks_at is not None and str(self._breaks_at) in texts:
            raise KeyboardInterrupt
        self.asked += texts
        return [
            Signals({model: Estimate(int(text) / 1000, f"{self.version}/{head}") for model, head in heads.items()})
            for text in texts
        ]


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    prompts = [str(i) for i in range(300)]
    first, second, third = Prober(breaks_at=200), Prober(), Prober()
    heads = {"a": "x", "b": "y"}
    with pytest.raises(KeyboardInterrupt):
        probe_signals(first, heads, prompts, tmp_path)
    with score_file(tmp_path, first.version, heads, prompts).open("ab") as file:
        file.write(b'{"half a line')
    found = probe_signals(second, heads, prompts, tmp_path)
    assert first.asked + second.asked == prompts
    assert len(first.asked) == 192
    assert [one.p_success["a"] for one in found] == [Estimate(i / 1000, "counting@1/x") for i in range(300)]
    assert probe_signals(third, heads, prompts, tmp_path) == found
    assert third.asked == []
    assert len(probe_signals(third, heads, prompts[1:], tmp_path)) == 299
    assert third.asked == prompts[1:]
    assert probe_signals(third, {"a": "y"}, prompts, tmp_path) != found, "another head is another word"


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, ["--model", "weak=w"], "name at least two models"),
        ({}, ["--model", "weak=w", "--model", "strnog=s"], "--model strnog: .*did you mean `strong`"),
        ({}, ["--model", "weak=w", "--model", "strong=t"], "no column 't' for --model strong"),
        ({}, ["--model", "weak=w", "--model", "strong=s:sc:x:y"], r"write NAME=CORRECT\[:COST_USD"),
        ({}, ["--model", "weak=w:wc", "--model", "strong=s"], "a column of cost for some models only"),
        ({"s": 7.0}, MODELS, "column 's' holds 7.0 in row 0 .*; it takes numbers from 0 to 1"),
        ({"sc": -1.0}, MODELS, "column 'sc' holds -1.0 in row 0"),
        ({"sc": float("inf")}, MODELS, "column 'sc' holds inf in row 0"),
        ({"w": "yes"}, MODELS, "column 'w' holds 'yes' in row 0"),
        ({"w": None}, MODELS, "0 of 60 queries have an outcome of every model"),
        ({"prompt": None}, MODELS, "column 'prompt' is empty in row 0"),
        ({}, [*MODELS, "--group", "domain"], "no column 'domain' for --group"),
        ({}, [*MODELS, "--p-success", "third=ps"], "--p-success third"),
        ({}, [*MODELS, "--ask", "gpt"], "--ask gpt: .*neither a model nor an alias"),
        ({}, [*MODELS, "--cost", "wc"], "belong to --by"),
        ({}, ["--model", "weak=w", "--model", "strong=s", "--by", "nobody"], "no column 'nobody' for --by"),
        ({}, ["--model", "weak=wcorrect", "--model", "strong=s:cost", "--prompt", "promt", "--group", "domain"],
         r"no column 'promt' for --prompt \(did you mean `prompt`\?\), 'domain' for --group, 'wcorrect' for --model "
         r"weak \(correctness\), 'cost' for --model strong \(cost\); it has prompt, .*; name those that it has"),
        ({}, ["--model", "weak=a", "--model", "strong=b", "--by", "ps", "--query", "id,w", "--cost", "usd"],
         "no column 'id' for --query id, 'correct' for --correct, 'usd' for --cost; it has prompt, "),
        ({}, ["--model", "weak=c", "--model", "strong=d", "--by", "task", "--query", "prompt", "--correct", "w"],
         "column 'task' never holds 'c' .--model weak., 'd' .--model strong.; it holds "),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_with_the_field_the_value_and_the_fix(
    policy: Path, tmp_path: Path, change: dict[str, Any], arguments: list[str], words: str
) -> None:
    table = written(frame().assign(**change), tmp_path, "table.csv" if change else "table.parquet")
    given = [] if "--p-success" in arguments or "--by" in arguments else GIVEN
    done = simulate(policy, table, *arguments, *given)
    assert done.exit_code == 2
    assert re.search(words, done.output.replace("\n", " ")), done.output


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"PAR1"])
def test_what_is_no_table_is_refused(policy: Path, tmp_path: Path, content: bytes) -> None:
    for name in ("table.parquet", "table.csv", "table.txt"):
        (tmp_path / name).write_bytes(content)
        done = simulate(policy, tmp_path / name, *MODELS)
        assert done.exit_code == 2, name
        assert done.output.startswith("error: "), name


def test_two_rows_for_one_query_are_refused(tmp_path: Path) -> None:
    table = pd.DataFrame({"q": [1, 1], "m": ["a", "a"], "correct": [1, 0], "prompt": "x"})
    with pytest.raises(TableError, match=r"'a' has several rows for the query \['1'\]"):
        read_outcomes(written(table, tmp_path), Columns("prompt", {"a": ("a", None, None)}, Long("m", ("q",))))


def test_real_outcomes_in_the_long_form(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip(f"the routing data is not at {DATA}")
    results = pd.read_parquet(DATA / "zeroeval_results.parquet", columns=["task", "qid", "model", "correct"])
    names = {"weak": "gpt-4o-mini-2024-07-18", "strong": "gpt-4o-2024-08-06"}
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.split("signals:")[0] + "routes: [{name: auto, when: {model: auto}, use: [weak]}]\n")
    out = tmp_path / "out.json"
    done = simulate(
        policy, DATA / "zeroeval_results.parquet", *(x for k, v in names.items() for x in ("--model", f"{k}={v}")),
        "--by", "model", "--query", "task,qid", "--prompts", DATA / "zeroeval_queries.parquet", "--prompt", "question",
        "--cost", "cost_usd_est", "--tokens", "out_tokens_est", "--group", "task", "--json", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    held = results.pivot(index=["task", "qid"], columns="model", values="correct")[list(names.values())]
    queries = pd.read_parquet(DATA / "zeroeval_queries.parquet")
    held = held.reindex(pd.MultiIndex.from_frame(queries[["task", "qid"]])).dropna().astype(float)
    found = routers_of(out)
    assert found["policy"]["accuracy"]["value"] == pytest.approx(held[names["weak"]].mean())
    assert found["always weak: weak"]["policy_accuracy_gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["oracle"]["accuracy"]["value"] == pytest.approx(held.max(axis=1).mean())
