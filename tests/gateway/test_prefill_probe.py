"""The tiers `prefill` and `self`, from fitting to a decision.

What is fitted on is what the engine hears, and the prompt that was read for the probe is not read again for the answer.
"""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gateway.engine_link import EngineConnection
from gateway.policies import CannotServe, checked_policy
from local_engine.arithmetic import problems
from local_engine.config import locate
from local_engine.engine import Engine
from local_engine.model import load_model
from probes.artifact import read
from probes.cli import app
from probes.errors import ArtifactError, EncoderError
from probes.heads import Heads
from probes.listen import ListenedModel, locate_model
from probes.manifest import ARTIFACTS, MANIFEST
from probes.prefill import ANSWERS, QUESTION, PromptProbe, rating_features
from probes.scored import listened
from tests.gateway.conftest import running
from tests.gateway.fake_upstream import FakeUpstream
from tests.local_engine.engine_harness import Caller, user
from tests.local_engine.fake_prober import FakeReader

pytestmark = pytest.mark.timeout(600)  # fitting takes half a minute of an idle core
BASE = Path(locate("bundled/base")[0])
POLICY = """
version: 1
providers:
  home: {{engine: embedded}}
  fake: {{base_url: "{url}", timeout: 5s, retries: 0}}
models:
  local: {{provider: home, model: bundled/base, context: 1024, price: free, speculation: "off"}}
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
signals:
  difficulty: {{probe: {probe}, heads: {{local: local}}, timeout: 20s}}
routes:
  - {{name: auto, when: {{model: auto}}, use: [local], cache: off}}
  - name: picky
    when: {{model: picky}}
    objective: cheapest
    subject_to: {{p_success: ">= 0.5"}}
    candidates: [local]
    otherwise: best
    cache: off
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hears` (prefill) and `rates` (self), fitted on a few sums, the short ones labelled right."""
    folder = tmp_path_factory.mktemp("probes")
    prompts = [problem.question for level in (1, 5) for problem in problems(5, level, 20)]
    table = pd.DataFrame({"q": prompts, "right": [1] * 19 + [0] * 19 + [1] * 2, "tokens": [20] * 20 + [150] * 20})
    table.to_parquet(folder / "t.parquet")
    for tier, name in (("prefill", "hears"), ("self", "rates")):
        options = ["--tier", tier, "--model", "bundled/base", "--out", str(folder / name), "--tokens", "local=tokens"]
        done = CliRunner().invoke(
            app, ["fit", str(folder / "t.parquet"), "--prompt", "q", "--head", "local=right", *options]
        )
        assert done.exit_code == 0, done.output
    return folder


def test_what_is_fitted_on_is_what_the_engine_hears() -> None:
    prompts = [problem.question for level in (1, 6) for problem in problems(6, level, 2)]
    heard = ListenedModel.load("bundled/base")
    states = heard.states(prompts, (2, 3, 6))
    ratings = heard.ratings(prompts)
    reader = FakeReader((2, 3, 6))
    rater = FakeReader((), QUESTION)
    rater.answers = ANSWERS
    reader.decided = False
    whole = FakeReader((2, 3, 6), decided=False, over="prompt")
    means = heard.states(prompts, (2, 3, 6), over="prompt")
    engine = Engine({"m": load_model("m", "bundled/base", "float32", "cpu")}, readers={"m": [reader, whole, rater]})
    engine.start()
    try:
        caller = Caller(engine)
        for prompt in prompts:
            caller.wait(caller.probe(user(prompt), "m"))
    finally:
        engine.stop()
    for at in range(len(prompts)):
        np.testing.assert_allclose(reader.seen[at][0].reshape(-1), states[at], atol=1e-3)
        np.testing.assert_allclose(whole.seen[at][0].reshape(-1), means[at], atol=1e-3)
        np.testing.assert_allclose(rating_features(rater.seen[at][1]), ratings[at], atol=1e-2)


def test_an_artifact_holds_what_it_was_fitted_on(fitted: Path) -> None:
    hears, rates = read(fitted / "hears").manifest, read(fitted / "rates").manifest
    assert (hears.tier, hears.encoder, hears.layers) == ("prefill", "bundled/base", (2, 3, 4, 6))
    assert (rates.tier, rates.question, rates.dims) == ("self", QUESTION, 3)
    assert hears.encoder_sha256 == rates.encoder_sha256
    artifact = read(fitted / "hears")
    whole = replace(artifact, manifest=hears.model_copy(update={"over": "prompt"}))
    assert (hears.over, PromptProbe(artifact).over, PromptProbe(whole).over) == ("last", "last", "prompt")
    (prompt,) = problems(8, 2, 1)
    heard = ListenedModel.load("bundled/base")
    expected = heard.states([prompt.question], hears.layers, over="prompt")
    np.testing.assert_array_equal(listened(whole, heard, [prompt.question]), expected)
    refused = CliRunner().invoke(
        app, ["fit", str(fitted / "t.parquet"), "--prompt", "q", "--head", "local=right", "--out", str(fitted / "no"),
              "--over", "prompt"]
    )  # fmt: skip
    assert "--over prompt: belongs to --tier prefill" in refused.output
    assert isinstance(heads := read(fitted / "rates").heads, Heads)
    assert heads.weight.size == 2 * 3
    easy, hard = problems(7, 1, 1)[0].question, problems(7, 5, 1)[0].question
    probe = PromptProbe.load(fitted / "hears", BASE)
    states = ListenedModel.load("bundled/base").states([easy, hard], probe.layers)
    said = [probe.read(row.reshape(4, -1), FakeRating()) for row in states]
    assert said[0].p_success["local"] > 0.5 > said[1].p_success["local"]
    assert said[0].out_tokens["local"][0] < 60 < said[1].out_tokens["local"][0]


class FakeRating:
    entropy = 0.1
    p_true = internal_confidence = None


def test_weights_other_than_those_it_was_fitted_on_are_refused(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was fitted on encoder 'bundled/base'"):
        PromptProbe.load(fitted / "hears", BASE.parent / "nano")
    with pytest.raises(ArtifactError, match="no safetensors weights"):
        PromptProbe.load(fitted / "hears", tmp_path)
    with pytest.raises(EncoderError, match="no model in"):
        locate_model(str(tmp_path))


@pytest.mark.anyio
@pytest.mark.engine
async def test_no_token_of_a_routed_prompt_is_read_twice(fitted: Path, upstream: FakeUpstream, tmp_path: Path) -> None:
    """Through a real gateway and a real engine process, by the usage that callers see and by the engine's own count."""
    policy = POLICY.format(url=upstream.url, probe="./hears")

    def ask(model: str, text: str) -> dict[str, Any]:
        message = {"role": "user", "content": text}
        return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 20}

    async with running(policy, tmp_path / "home", policy_folder=fitted) as gateway:
        link = gateway.app.engine
        assert link is not None
        async with asyncio.timeout(240):
            await link.ready.wait()
        _, _, plain = await gateway.chat(ask("auto", "What is 13 + 28?"))  # nothing is measured on this route
        before = await _stats(link)
        _, _, sounded = await gateway.chat(ask("picky", "What is 14 + 29?"))
        after = await _stats(link)
        rows = await gateway.rows()
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert sounded["usage"]["prompt_tokens_details"]["cached_tokens"] == sounded["usage"]["prompt_tokens"]
    assert (before.held_found, after.held_found, after.held_prompts) == (0, 1, 0)
    written = sounded["usage"]["completion_tokens"]
    assert after.computed_tokens - before.computed_tokens == sounded["usage"]["prompt_tokens"] + written - 1
    decision = json.loads(rows[0]["decision"])
    assert decision["probe_version"].startswith("hears@")
    assert 0 < decision["candidates"][0]["p_success"] < 1


async def _stats(link: EngineConnection) -> Any:
    assert link.client is not None
    return await link.client.stats()


def test_a_probe_of_a_model_that_the_policy_lacks_is_named(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "hears").mkdir()
    for file in (fitted / "hears").iterdir():
        (tmp_path / "hears" / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "hears" / MANIFEST).read_text())
    (tmp_path / "hears" / MANIFEST).write_text(json.dumps(manifest | {"encoder": "bundled/other", "certificates": []}))
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(url="http://127.0.0.1:9/v1", probe="./hears"))
    with pytest.raises(CannotServe, match="'bundled/other' read, which is no local model of this policy"):
        checked_policy(file)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tier", "prefill"], "say whose"),
        (["--model", "x"], "leave out"),
        (["--out", str(BASE)], "a model is there"),
    ],
)
def test_a_tier_and_its_model_go_together(fitted: Path, options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(
        app, ["fit", str(fitted / "t.parquet"), "--prompt", "q", "--head", "local=right", "--out", "x", *options]
    )
    assert done.exit_code == 2
    assert complaint in done.output


def test_the_shipped_probe_hears_the_bundled_model() -> None:
    probe = PromptProbe.load(ARTIFACTS / "prefill-base", BASE)
    easy, hard = problems(8, 1, 1)[0].question, problems(8, 6, 1)[0].question
    states = ListenedModel.load("bundled/base").states([easy, hard], probe.layers)
    said = [probe.read(row.reshape(len(probe.layers), -1), FakeRating()) for row in states]
    assert said[0].p_success["local"] > 0.9 > said[1].p_success["local"]
    assert said[0].out_tokens["local"][0] < said[1].out_tokens["local"][0]
