"""Why a request came to its route: the first condition that failed of each route before, in words."""

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from routers.facts import route_facts
from routers.load import parse
from routers.types import Query

HEAD = """\
version: 1
providers: {home: {engine: embedded}}
models: {m: {provider: home, model: bundled/base}}
routes:
"""
AT_MS = int(datetime(2026, 11, 23, 21, 30, tzinfo=UTC).timestamp() * 1000)
ASKED = Query("auto", "acme", 500, None, key="ci", session="s", at_ms=AT_MS, tags=frozenset({"t"}))


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        ("model: fast", "the model asked for is auto, asked: fast"),
        ("tenant: [legal, health]", "the tenant is acme, asked: health, legal"),
        ("key: batch", "the key is ci, asked: batch"),
        ("team: red", "the team is not known, asked: red"),
        ("endpoint: embeddings", "the endpoint is chat.completions, asked: embeddings"),
        ("tag: [private]", "tags: t, asked: private"),
        ("needs: tools", "needs nothing but words, asked: tools"),
        ('input_tokens: ">= 1000 and <= 2000"', "about 500 tokens of prompt, asked: >= 1000 and <= 2000"),
        ('input_tokens: "<= 400"', "about 500 tokens of prompt, asked: <= 400"),
        ("not: {tag: t, key: ci}", "excepted: the key is ci; tag t"),
        (
            'not: {input_tokens: "<= 500", schedule: {days: mon}}',
            "excepted: about 500 tokens of prompt, <= 500; at mon",
        ),
        (
            "schedule: {days: sat-sun, hours: 22:00-06:00, zone: Europe/Berlin}",
            "at mon 22:30, asked: sat, sun 22:00-06:00 Europe/Berlin",
        ),
        ("share: 1%", "its session falls at 8.14%, outside the share of 1%"),
    ],
)
def test_the_first_condition_that_fails_is_told(condition: str, why: str) -> None:
    policy = parse(f"{HEAD}  - {{name: first, when: {{{condition}}}, use: [m]}}\n  - {{name: rest, use: [m]}}\n")
    first, rest = route_facts(policy, ASKED)
    assert first.why.startswith(why)
    assert (first.taken, rest) == (False, ("rest", True, "takes every request"))


def test_what_holds_is_told_of_the_route_taken() -> None:
    policy = parse(
        HEAD + "  - {name: night, when: {tag: [t, u], key: ci, share: 50%, schedule: {hours: 21:00-22:00}}, use: [m]}\n"
    )
    (night,) = route_facts(policy, ASKED)
    assert night.taken
    assert night.why.startswith(
        "the key is ci; tag t; at mon 21:30, within every day 21:00-22:00 UTC; its session falls"
    )
    (named,) = route_facts(policy, replace(ASKED, model="m", key="other"))
    assert (named.taken, named.why) == (False, "the key is other, asked: ci")
