"""The policies and the schema that come with Leadline."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.policies import accept_numbers
from routers.aims import Guarantee
from routers.errors import PolicyError
from routers.load import load, parse, preset
from routers.policy import Difficulty, Listing, Price
from routers.schema import policy_schema
from routers.units import Budget
from routers.yaml import read
from tests.routers.policies import changed

POLICIES = Path(__file__).parents[2] / "policies"
RULES = partial(accept_numbers, POLICIES)


@pytest.mark.parametrize("name", ["default", "openai"])
def test_presets_load(name: str) -> None:
    policy = parse(preset(name), file=name)  # type: ignore[arg-type]  # the names are what is tested
    assert policy.aliases == ("auto",)


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError, match="no preset `x`; there are default, openai"):
        preset("x")  # type: ignore[arg-type]  # the wrong name is the test


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_alone_and_say_when_to_choose_them(path: Path) -> None:
    assert load(path, rules=RULES).aliases == ("auto",)
    assert "# Choose this when" in path.read_text(encoding="utf-8")


def written_keys(schema: dict[str, Any], node: object, of: str, seen: set[str]) -> None:
    """Adds `Definition.key` for each key of `node`, read as an instance of that definition."""
    definition = schema["$defs"][of] if of else schema
    assert isinstance(node, dict)
    for key, value in node.items():
        seen.add(f"{of}.{key}")
        shape = definition["properties"][key]
        values = value if isinstance(value, list) else [value]
        if "additionalProperties" in shape or "patternProperties" in shape:  # named entries
            values = list(value.values())
        for inner in re.findall(r"#/\$defs/(\w+)", json.dumps(shape)):
            for part in values:
                if isinstance(part, dict):
                    written_keys(schema, part, inner, seen)


def test_the_reference_shows_every_field() -> None:
    schema, seen = policy_schema(), set[str]()
    written_keys(schema, read((POLICIES / "reference.yaml").read_text(encoding="utf-8"), "r").data, "", seen)
    fields = {f"{name}.{key}" for name, of in schema["$defs"].items() for key in of["properties"]}
    assert seen == fields | {f".{key}" for key in schema["properties"]}


def test_what_the_reference_calls_a_default_is_one() -> None:
    text = (POLICIES / "reference.yaml").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    bare = []
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        opens = index + 1 < len(lines) and len(lines[index + 1]) - len(lines[index + 1].lstrip()) > indent
        if not re.search(r"# default( |$|,|;)", line) or opens:
            bare.append(line)
    assert len(bare) < len(lines) - 12
    assert parse("".join(bare), rules=RULES).version_hash == parse(text, rules=RULES).version_hash


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"# mine\nversion: \xff")
    with pytest.raises(PolicyError, match=r"mine.yaml:2: not UTF-8"):
        load(path)


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((POLICIES / "schema.json").read_text(encoding="utf-8"))
    assert published == policy_schema(), "write policies/schema.json from routers.schema.policy_schema()"


def test_the_schema_knows_every_key_of_the_recipes() -> None:
    schema = json.dumps(policy_schema())
    for key in ("providers", "p_success_gap", "on_failure", "cached_input", "logprobs"):
        assert f'"{key}"' in schema


DESIGNED = """\
version: 1
providers:
  home:   {engine: embedded}
  openai: {base_url: https://api.openai.com/v1, api_key: env:OPENAI_API_KEY}
models:
  local:  {provider: home, model: bundled/base, draft: bundled/draft}
  strong: {provider: openai, model: gpt-5}
signals:
  difficulty: {probe: default}
routes:
  - name: private
    when: {tag: private}
    use: [local]
  - name: auto
    when: {model: auto}
    objective: cheapest
    subject_to: {p_success: ">= 0.90", ttft_p95: "<= 1.5s", cost: "<= $0.01"}
    candidates: [local, local+think, local>strong, strong]   # ">" is a cascade
    guarantee: {loss: weak_wrong_strong_right, at_most: 0.05}
    on_failure: [strong, local]
limits:
  - {key: "*", budget: $50/month, rate: 600/min}
  - {run: "*", budget: $2, at: {80%: cheaper, 100%: local}}
"""
"""The design's sketch of a policy."""
GPT_5 = Listing(Price(1_250_000_000, 125_000_000, 1_250_000_000, 10_000_000_000, 10_000_000_000), 400_000, 128_000)


def test_the_designs_sketch_loads_once_what_is_wrong_with_it_is_mended() -> None:
    with pytest.raises(PolicyError) as caught:
        parse(DESIGNED, prices=lambda provider, model: GPT_5)
    found = {(problem.line, problem.field): problem.fix for problem in caught.value.problems}
    assert found[6, "models.local.draft"] == "write `speculation: draft:MODEL`, with the model that drafts"
    assert found[19, "routes[1].guarantee"] == "remove the one or the other"  # a cascade
    assert (23, "limits[1].budget") not in found
    mended = DESIGNED.replace("draft: bundled/draft", "speculation: draft:bundled/draft").replace(
        "[local, local+think, local>strong, strong]", "[local, strong]"
    )
    policy = parse(mended, prices=lambda provider, model: GPT_5)
    auto = policy.routes[1]
    assert auto.candidates == ("local", "strong")
    assert auto.heads == {"local": "local", "strong": "strong"}
    assert auto.rule == "cheapest with p_success >= 0.9 and cost <= $0.01 and ttft_p95 <= 1500ms"
    assert auto.guarantee == Guarantee("weak_wrong_strong_right", 0.05)
    assert policy.limits[1].budget == Budget(2_000_000_000, "total")


def test_heads_are_those_of_the_models_names_where_none_are_named() -> None:
    assert parse(changed("heads: {local: local, weak: weak, strong: strong}", "timeout: 1s")).difficulty == Difficulty(
        ("default",), {"local": "local", "weak": "weak", "strong": "strong"}, 1000
    )
