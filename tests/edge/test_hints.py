"""Hints: what one request may ask of its own decision, in headers, read strictly."""

import pytest

from gateway.cache.exact import cache_key, cache_secret
from gateway.edge.headers import read_headers
from gateway.errors import InvalidRequest
from routers.types import Hints


def hints(**headers: str) -> Hints | None:
    return read_headers(
        [(f"x-leadline-{name.replace('_', '-')}".encode(), v.encode()) for name, v in headers.items()]
    ).hints


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"max_cost": "$0.01"}, Hints(max_cost_nanousd=10_000_000)),
        ({"max_cost": "0"}, Hints(max_cost_nanousd=0)),
        ({"min_quality": "0.9", "effort": "low"}, Hints(min_p_success=0.9, effort="low")),
        ({"models": "local, strong ,a/b:c"}, Hints(models=frozenset({"local", "strong", "a/b:c"}))),
    ],
)
def test_hints_are_read(headers: dict[str, str], expected: Hints | None) -> None:
    assert hints(**headers) == expected


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("max_cost", "cheap", "such as 0.50"),
        ("max_cost", "-1", "such as 0.50"),
        ("max_cost", "nan", "such as 0.50"),
        ("max_cost", "1e-12", "such as 0.50"),
        ("min_quality", "90%", "send 0 to 1"),
        ("min_quality", "1.01", "send 0 to 1"),
        ("min_quality", "", "send 0 to 1"),
        ("effort", "medium", "none, low, high"),
        ("effort", "LOW", "none, low, high"),
        ("models", "a,,b", "with ',' between them"),
        ("models", "", "with ',' between them"),
        ("models", ",".join(["a"] * 65), "up to 64 names"),
    ],
)
def test_a_hint_that_cannot_be_read_names_header_value_and_fix(name: str, value: str, fix: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        hints(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"x-leadline-{name.replace('_', '-')}: {value[:9]!r}"[:-1])
    assert fix in message


def test_a_hint_that_is_sent_twice_is_refused() -> None:
    header = (b"x-leadline-max-cost", b"1")
    with pytest.raises(InvalidRequest, match="x-leadline-max-cost: was sent twice"):
        read_headers([header, header])


def test_an_unknown_header_of_ours_is_told_all_that_there_are() -> None:
    with pytest.raises(InvalidRequest) as caught:
        hints(max_costs="1")
    assert "x-leadline-max-cost," in str(caught.value)


def test_an_answer_under_one_hint_is_not_kept_for_another() -> None:
    asked = [None, Hints(effort="low"), Hints(models=frozenset("ab")), Hints(models=frozenset("a")), Hints(0)]
    keys = {
        cache_key(cache_secret(b"x"), tenant="t", policy_version="v", route="r", fields={}, hints=of) for of in asked
    }
    assert len(keys) == len(asked)
