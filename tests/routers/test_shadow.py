"""Shadows are cast by a share of a route's requests, on models that could answer, and never by what is not compared."""

import pytest
from msgspec.structs import replace

from routers.decide import decide
from routers.errors import PolicyError
from routers.load import parse
from routers.policy import Policy
from routers.types import Hints, Query, Signals, State

FILE = """
version: 1
providers: {{p: {{base_url: "http://127.0.0.1:9/v1"}}}}
models:
  weak: {{provider: p, model: m, context: 1000, price: free}}
  strong: {{provider: p, model: n, context: 9000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  tiny: {{provider: p, model: o, context: 10, price: free}}
routes:
  - name: auto
    when: {{model: auto}}
    use: [weak]
    shadow: {shadow}
"""
QUERY = Query("auto", "t", 100, 50)


def policy(shadow: str) -> Policy:
    return parse(FILE.format(shadow=shadow))


def shadows(given: Policy, query: Query = QUERY, state: State = State(), seeds: int = 1) -> list[tuple[str, ...]]:
    return [decide(query, Signals(), given, state, seed).shadow for seed in range(seeds)]


def test_a_share_of_seeds_casts_one_and_the_same_seed_always_does() -> None:
    given = policy("{models: [strong], share: 20%}")
    cast = shadows(given, seeds=4000)
    assert 0.17 < sum(1 for names in cast if names) / 4000 < 0.23
    assert cast == shadows(given, seeds=4000)


def test_who_cannot_answer_or_answers_already_is_left_out() -> None:
    given = policy("{models: [weak, strong, tiny], share: 100%}")
    assert shadows(given) == [("strong",)]
    assert shadows(given, state=State(unavailable={"strong": "down"})) == [()]
    assert shadows(given, state=State(budget_remaining_nanousd=0)) == [()]
    assert shadows(given, replace(QUERY, hints=Hints(models=frozenset({"weak"})))) == [()]


@pytest.mark.parametrize("change", [{"choices": 2}, {"needs_tools": True}, {"endpoint": "completions"}])
def test_what_cannot_be_compared_casts_none(change: dict[str, object]) -> None:
    assert shadows(policy("{models: [strong], share: 100%}"), replace(QUERY, **change)) == [()]


@pytest.mark.parametrize(
    ("shadow", "words"),
    [
        ("{models: [nobody]}", "no model of this name"),
        ("{models: [strong], judge: strnog}", "did you mean `strong`"),
        ("{models: []}", "shadow"),
        ("{models: [strong], share: 2}", "share"),
    ],
)
def test_a_bad_shadow_is_an_error_with_its_line(shadow: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy(shadow)
    assert words in str(caught.value)
    assert "routes[0].shadow" in str(caught.value)


def test_a_shadow_is_part_of_the_version() -> None:
    plain = parse(FILE.replace("    shadow: {shadow}\n", "").format())
    versions = {plain.version_hash, *(policy(s).version_hash for s in ("{models: [strong]}", "{models: [tiny]}"))}
    assert len(versions) == 3
