"""Probes in order, through a real gateway: words in the worker first, the engine only for what they leave open."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.manifest import MANIFEST
from probes.runtime import EncoderProbe
from probes.static import StaticProbe
from probes.static_fit import fit_static, write_static
from probes.table import Table
from tests.gateway.conftest import running
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 5s, retries: 0}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: fake, model: dear, context: 16000, max_output: 1000, price: {{input: $2/Mtok, output: $8/Mtok}}}}
signals:
  difficulty: {{probe: {probe}, heads: {{cheap: weak, dear: strong}}}}
routes:
  - name: auto
    when: {{model: auto}}
    objective: cheapest
    subject_to: {{p_success: ">= 0.6"}}
    candidates: [cheap, dear]
"""
SUM, ESSAY, OTHER = "What is 15 plus 26?", "Write essay number 9 on empire 63.", "请问有多少种不同的放法?"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static probes of sums, which the weak model can do, and essays, which it cannot; one is never sure."""
    rng = np.random.default_rng(0)
    sums = [f"What is {a} plus {b}?" for a, b in rng.integers(10, 99, (60, 2))]
    essays = [f"Write essay number {i} on empire {i * 7}." for i in range(60)]
    labels = np.column_stack([[1.0] * 58 + [0.0] * 60 + [1.0] * 2, [1.0] * 57 + [0.0] * 3 + [1.0] * 57 + [0.0] * 3])
    tokens = np.array([5.0] * 60 + [300.0] * 60)
    table = Table(
        sums + essays,
        np.column_stack([labels, tokens]),
        ("weak", "strong", "weak.tokens"),
        ("w", "s", "t"),
        kinds=("correct", "correct", "out_tokens"),
    )
    folder = tmp_path_factory.mktemp("policy")
    for name, answers in (("words", 1.0), ("unsure", 0.0)):
        write_static(fit_static(table, answers=answers), table, folder / name, name)
    return folder


def ask(text: str) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0}


async def test_words_decide_in_the_worker_without_an_engine(
    upstream: FakeUpstream, words: Path, tmp_path: Path
) -> None:
    policy = POLICY.format(url=upstream.url, probe="./words")
    async with running(policy, tmp_path / "home", policy_folder=words) as gateway:
        assert gateway.app.engine is not None
        assert not gateway.app.engine.started
        for name, text in (("easy", SUM), ("essay", ESSAY), ("other", OTHER)):
            assert (await gateway.chat(ask(text), **{"X-Session-Id": name}))[0] == 200
        rows = {row["session"]: row for row in await gateway.rows()}
        easy, essay, other = rows["easy"], rows["essay"], rows["other"]
    assert (easy["model_served"], essay["model_served"]) == ("cheap", "dear")
    decisions = [json.loads(row["decision"]) for row in (easy, essay, other)]
    assert [bool(d["probe_version"]) for d in decisions] == [True, True, False]
    assert decisions[0]["probe_version"].startswith("words@")
    assert [bool(d.get("degraded")) for d in decisions] == [
        False,
        False,
        True,
    ]  # it abstained, and nobody else is there


@pytest.mark.engine
@pytest.mark.timeout(300)
async def test_the_engine_is_asked_for_what_words_leave_open(
    upstream: FakeUpstream, words: Path, tmp_path: Path
) -> None:
    """About what words are undecided on, both count; where they abstain, the encoder alone."""
    policy = POLICY.format(url=upstream.url, probe="[./unsure, default]").replace(
        "dear: strong}", "dear: strong}, timeout: 20s"
    )
    async with running(policy, tmp_path / "home", policy_folder=words) as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(240):
            await gateway.app.engine.ready.wait()
        for name, text in (("easy", SUM), ("other", OTHER)):
            assert (await gateway.chat(ask(text), **{"X-Session-Id": name}))[0] == 200
        rows = {row["session"]: row for row in await gateway.rows()}
        easy, other = rows["easy"], rows["other"]
    both, alone = (json.loads(row["decision"]) for row in (easy, other))
    assert [part.partition("@")[0] for part in both["probe_version"].split("+")] == ["unsure", "default"]
    assert alone["probe_version"].partition("@")[0] == "default"
    assert not both.get("degraded")
    assert not alone.get("degraded")
    said = StaticProbe.load(words / "unsure").read(SUM).p_success["weak"]
    heard = EncoderProbe.load().probe([[{"role": "user", "content": SUM}]])[0]["weak"]
    p = next(one["p_success"] for one in both["candidates"] if one["model"] == "cheap")
    assert p == pytest.approx((said + heard) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("probe", "complaint"),
    [
        ("[./words, ./words]", "at most one of each, in the order static, encoder, prefill, self"),
        ("[default, ./words]", "is of tier `static`, after `encoder`"),
        ("[./words, ./nowhere]", "no probe artifact in"),
        ("./other", "refit with `leadline probe fit --tier static`"),
    ],
)
def test_probes_that_cannot_be_used_are_named(words: Path, tmp_path: Path, probe: str, complaint: str) -> None:
    from gateway.policies import CannotServe, checked_policy

    for name in ("words", "other"):
        (tmp_path / name).mkdir()
        for file in (words / "words").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "other" / MANIFEST).read_text())
    (tmp_path / "other" / MANIFEST).write_text(json.dumps(manifest | {"encoder_sha256": "0", "certificates": []}))
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(url="http://127.0.0.1:9/v1", probe=probe))
    with pytest.raises(CannotServe, match=complaint.replace("[", r"\[")):
        checked_policy(file)
