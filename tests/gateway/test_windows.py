"""The context window of a local model is its own where the policy states none: holds and routes go by it."""

import json
import shutil
from pathlib import Path

import pytest

import local_engine
from gateway.policies import CannotServe, checked_policy, with_windows
from gateway.upstream.http import HttpClient
from gateway.world import build_world
from local_engine.client import EngineClient
from routers.cost import ASSUMED_CONTEXT
from routers.load import parse

POLICY = """
version: 1
providers:
  home: {engine: embedded}
  far: {base_url: "http://127.0.0.1:9/v1"}
models:
  bundled: {provider: home, model: bundled/base, price: free}
  own: {provider: home, model: ./mine, price: {input: $1/Mtok, output: $1/Mtok}}
  shorter: {provider: home, model: bundled/nano, context: 512, price: free}
  hub: {provider: home, model: someone/something, price: free}
  remote: {provider: far, model: bundled/base, price: free}
routes:
  - {name: auto, use: [bundled, own]}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder of the policy's own model."""
    return Path(shutil.copytree(Path(local_engine.__file__).parent / "bundled" / "nano", tmp_path / "mine"))


class NoEngine:
    client: EngineClient | None = None


def test_a_local_model_has_its_own_window(tmp_path: Path, mine: Path) -> None:
    config = mine / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 300}))
    expected = {"bundled": 1024, "own": 300, "shorter": 512, "hub": None, "remote": None}
    policy = parse(POLICY)
    found = with_windows(policy, tmp_path)
    assert {name: model.context for name, model in found.models.items()} == expected
    assert found.version_hash == policy.version_hash, "what the policy says is unchanged"
    world = build_world(policy, HttpClient(), NoEngine(), b"salt", folder=tmp_path)
    assert {name: target.context for name, target in world.targets.items()} == {
        name: window or ASSUMED_CONTEXT for name, window in expected.items()
    }
    assert world.targets["own"].max_output == 300
    assert world.policy.models["own"].context == 300, "routes reckon with it, too"
    config.write_text("[]")
    assert with_windows(policy, tmp_path).models["own"].context is None
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert checked_policy(tmp_path / "policy.yaml")[0].models["bundled"].context == 1024


def test_a_window_that_a_local_model_does_not_have_is_refused(tmp_path: Path, mine: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.replace("context: 512", "context: 1025"))
    with pytest.raises(CannotServe) as told:
        checked_policy(file)
    assert str(told.value) == (
        f"{file}:9: models.shorter.context: 1025 is more than the 1024 tokens that the model has room for; write at "
        "most that, or leave it out"
    )


def test_tools_that_a_local_models_template_leaves_out_are_refused(tmp_path: Path, mine: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.replace("model: ./mine", "model: ./mine, tools: true"))
    with pytest.raises(CannotServe) as told:
        checked_policy(file)
    assert "models.own.tools: the model's chat template knows no tools; leave it out" in str(told.value)
    template = mine / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if tools %}{% endif %}")
    checked_policy(file)
    template.unlink()
    config = mine / "tokenizer_config.json"
    for given, known in (("{{ messages }}", False), ([{"name": "tool_use", "template": "{{ tools }}"}], True)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": given}))
        if known:
            checked_policy(file)
        else:
            with pytest.raises(CannotServe, match="knows no tools"):
                checked_policy(file)
