"""All tiers at once: words, the encoder, a local model's states, and its word on itself, through a live gateway."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.in_order import InOrder
from gateway.policies import load_policy
from local_engine.arithmetic import problems
from probes.artifact import write
from probes.listen import ListenedModel, Ratings
from probes.prefill import QUESTION
from probes.table import Table
from probes.train import Recipe, fit_probe
from routers.types import Signals
from tests.gateway.conftest import ask, running
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.timeout(600)
POLICY = """
version: 1
providers:
  home: {engine: embedded}
  fake: {base_url: "URL", timeout: 5s, retries: 0}
models:
  local: {provider: home, model: bundled/base, context: 1024, price: free, speculation: "off"}
  cheap: {provider: fake, model: cheap, context: 16000, max_output: 1000, price: {input: $1/Mtok, output: $1/Mtok}}
signals:
  difficulty: {probe: [static, default, prefill-base, ./rates], heads: {local: local}, timeout: 20s}
routes:
  - name: auto
    when: {model: auto}
    candidates: [local, cheap]
    objective: cheapest
    subject_to: {p_success: ">= 0.99"}
    otherwise: cheapest
    cache: off
"""
HEADS = {"local": "local"}
TIERS = ["static", "default", "prefill-base", "rates"]
ASKED = [problem.question for level in (1, 3, 5, 6) for problem in problems(9, level, 6)] + [
    "Write a poem about the sea.", "Explain gravity to a child.", "hello", "thanks!", "Who wrote Faust?",
    "What is the capital of France?", "Prove that there are infinitely many primes.", "Is 91 a prime number?",
    "Derive the Fokker-Planck equation for a jump process.", "What is the integral of x times the sine of x?",
    "Translate 'good morning' into Latin.", "Who painted the ceiling of the Sistine Chapel?",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `rates`, a probe of tier self, fitted on a few sums, the short ones labelled right."""
    made = tmp_path_factory.mktemp("tiers")
    heard = ListenedModel.load("bundled/base")
    prompts = [problem.question for level in (1, 5) for problem in problems(5, level, 20)]
    labels = np.array([[1.0]] * 19 + [[0.0]] * 19 + [[1.0]] * 2)
    table = Table(prompts, labels, ("local",), ("right",))
    rates = fit_probe(
        table, Ratings(heard.name, heard.sha256), Recipe((0,), linear=True),
        name="rates", features=heard.ratings(prompts), tier="self", question=QUESTION, answers=1.0,
    )  # fmt: skip
    write(rates.artifact, made / "rates")
    (made / "policy.yaml").write_text(POLICY.replace("URL", "http://127.0.0.1:9/v1"))
    return made


@pytest.fixture(scope="module")
def first_of(folder: Path) -> dict[str, tuple[str, Signals]]:
    """For each tier the first question of ASKED that it decides, and what is then said, by a reading here."""
    file = folder / "policy.yaml"
    found: dict[str, tuple[str, Signals]] = {}
    said = InOrder.of(load_policy(file), folder).sound([[{"role": "user", "content": text}] for text in ASKED], HEADS)
    for text, signals in zip(ASKED, said, strict=True):
        found.setdefault(decided_by(signals.p_success["local"].source), (text, signals))
    assert set(found) == set(TIERS)
    return found


def decided_by(source: str) -> str:
    """The last of the artifacts that a source names."""
    return source.rpartition("/")[0].rpartition("+")[2].partition("@")[0]


@pytest.mark.anyio
@pytest.mark.engine
async def test_each_tier_decides_what_those_before_leave_open_and_the_receipt_says_which(
    folder: Path, first_of: dict[str, tuple[str, Signals]], upstream: FakeUpstream, tmp_path: Path
) -> None:
    policy = POLICY.replace("URL", upstream.url)
    async with running(policy, tmp_path / "home", policy_folder=folder) as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(300):
            await gateway.app.engine.ready.wait()
        for tier, (text, signals) in first_of.items():
            status, headers, _ = await gateway.chat(ask(text, "auto", max_tokens=4))
            assert status == 200
            url = f"{gateway.url}/leadline/v1/requests/{headers['x-request-id']}"
            async with gateway.session.get(url, headers=gateway.headers()) as response:
                decision = (await response.json())["decision"]
            local = next(one for one in decision["candidates"] if one["model"] == "local")
            assert decided_by(local["measured_by"]) == tier, text
            assert local["measured_by"] == signals.p_success["local"].source
            assert local["p_success"] == pytest.approx(signals.p_success["local"].value, abs=0.02)
            async with gateway.session.post(
                f"{gateway.url}/leadline/v1/explain", json=ask(text, "auto"), headers=gateway.headers()
            ) as response:
                explained = await response.json()
            assert f" by {local['measured_by'].rpartition('/')[0]}" in "\n".join(explained["lines"])


def test_commands_ask_every_tier_without_an_engine(folder: Path, first_of: dict[str, tuple[str, Signals]]) -> None:
    file, table = str(folder / "policy.yaml"), folder / "t.parquet"
    text, signals = first_of["rates"]
    env = {"LEADLINE_HOME": str(folder / "home"), "DATABASE_URL": None}
    done = CliRunner().invoke(app, ["explain", file, text, "--json"], env=env)
    assert done.exit_code == 0, done.output
    local = json.loads(done.stdout)["decision"]["candidates"][0]
    assert local["measured_by"] == signals.p_success["local"].source
    assert local["p_success"] == pytest.approx(signals.p_success["local"].value, abs=1e-4)
    asked = [text for text, _ in first_of.values()] * 5
    pd.DataFrame({"prompt": asked, "l": 1, "c": 1}).to_parquet(table)
    told = folder / "told.json"
    arguments = ["simulate", file, str(table), "--model", "local=l", "--model", "cheap=c", "--json", str(told)]
    done = CliRunner().invoke(app, arguments, env=env)
    assert done.exit_code == 0, done.output
    (answered,) = [fact for fact in json.loads(told.read_text())["facts"] if "by who answered" in fact]
    counts = Counter(decided_by(f"{part.rpartition(' ')[0]}/x") for part in answered.rpartition(": ")[2].split(", "))
    assert set(counts) == set(TIERS)
    assert [int(part.rpartition(" ")[2]) for part in answered.rpartition(": ")[2].split(", ")] == [5, 5, 5, 5]


def test_a_prompt_that_is_too_long_for_the_local_model_keeps_the_word_before(folder: Path) -> None:
    policy = load_policy(folder / "policy.yaml")
    assert policy.difficulty is not None
    heard = replace(policy, difficulty=replace(policy.difficulty, probes=("prefill-base",)))
    probe = InOrder.of(heard, folder)
    short, long = probe.sound([[{"role": "user", "content": text}] for text in ("hello", "hello " * 2000)], HEADS)
    assert short.probe == "ok"
    assert (long.probe, dict(long.p_success)) == ("unavailable", {})


def test_the_shipped_tiers_send_no_general_question_to_the_model_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    file = Path(__file__).parents[2] / "policies/tiers.yaml"
    probe = InOrder.of(load_policy(file), file.parent)
    asked = (
        "hello",
        "Who wrote Hamlet?",
        "Why is the sky blue?",
        "Capital of France?",
        "Largest planet?",
        "12 + 13 - 4?",
    )
    heads = {name: name for name in ("local", "weak", "strong")}
    said = probe.sound([[{"role": "user", "content": text}] for text in asked], heads)
    *general, easy = (signals.p_success["local"].value for signals in said)
    assert max(general) < 0.6 < 0.9 < easy
