"""What a configuration may say of speculation, and who drafts then."""

from typing import Any

import pytest

from local_engine.config import EngineConfig, Speculation, read_speculation
from local_engine.errors import ModelLoadError
from local_engine.model import LocalModel
from local_engine.runner import new_kv
from local_engine.spec.build import new_speculator, speculators
from tests.local_engine.runner_harness import BUDGET


@pytest.mark.parametrize(
    ("how", "meant"),
    [
        ("off", Speculation()),
        ("auto", Speculation(ngram=True, recycle=True)),
        ("ngram", Speculation(ngram=True)),
        ("recycle+exit:4", Speculation(recycle=True, exit_layer=4)),
        ("auto+draft:./a:b", Speculation(ngram=True, recycle=True, draft="./a:b")),
    ],
)
def test_ways_to_draft(how: str, meant: Speculation) -> None:
    assert read_speculation(how) == meant


@pytest.mark.parametrize(
    "how", ["", "on", "off+auto", "auto+auto", "ngram+auto", "draft:", "exit:0", "exit:-1", "draft:a+exit:2", "auto+"]
)
def test_what_is_no_way_to_draft_is_refused(how: str) -> None:
    with pytest.raises(ValueError, match="joined by"):
        read_speculation(how)


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ({"n": "auto"}, "speculation names 'n'; the models are m"),
        ({"m": "fast"}, "speculation of 'm': 'fast' is neither"),
    ],
)
def test_a_configuration_says_what_is_wrong(speculation: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(models={"m": "bundled/base"}, socket_path="s", speculation=speculation)


def test_who_drafts_is_built_from_what_is_said(bundled: LocalModel) -> None:
    kv = new_kv(bundled, BUDGET)
    make = speculators({"quiet": "off", "deep": "exit:3", "paired": "auto+draft:x"}, {"x": bundled})
    assert make("quiet", bundled, kv) is None
    names = {
        name: [proposer.name for proposer in speculator.proposers]
        for name in ("deep", "paired", "unnamed")
        if (speculator := make(name, bundled, kv)) is not None
    }
    assert names == {
        "deep": ["exit:3"],
        "paired": ["ngram", "recycle", "draft:x"],
        "unnamed": ["ngram", "recycle"],
    }


def test_a_layer_that_is_not_there_is_refused(bundled: LocalModel) -> None:
    options: dict[str, Any] = {"model": bundled, "kv": new_kv(bundled, BUDGET), "drafters": {}}
    with pytest.raises(ModelLoadError, match="exit:99 must name a layer"):
        new_speculator("exit:99", **options)
