"""The conditions of a route: what each takes, at which times, and which routes nothing can come to."""

from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from routers.errors import PolicyError
from routers.load import parse
from routers.policy import Policy
from routers.reach import takers_of
from routers.types import Query
from routers.when import Schedule, When, bucket

ASKED = Query("auto", "acme", 500, None, key="ci", team="red", id="req_1", tags=frozenset({"a"}))


def moment(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def policy(*conditions: str, models: str = "") -> Policy:
    """A route `r0`, `r1`, … for each of these, and one that catches the rest."""
    routes = "".join(f"  - {{name: r{i}, when: {{{text}}}, use: [m]}}\n" for i, text in enumerate(conditions))
    return parse(
        "version: 1\nproviders: {home: {engine: embedded}}\nmodels:\n  m: {provider: home, model: bundled/base}\n"
        f"  n: {{provider: home, model: bundled/nano}}\nroutes:\n{routes}  - {{name: rest, use: [n]}}\n{models}"
    )


def route(of: Policy, query: Query) -> str | None:
    found = of.route_for(query)
    return found.name if found is not None else None


@pytest.mark.parametrize(
    ("condition", "taken", "left"),
    [
        ("key: [ci, cd]", {}, {"key": "other"}),
        ("team: red", {}, {"team": None}),
        ("endpoint: [chat.completions, completions]", {"endpoint": "completions"}, {"endpoint": "embeddings"}),
        ("needs: [tools, format]", {"needs_format": True}, {"needs_logprobs": True}),
        ("needs: logprobs", {"needs_logprobs": True}, {"needs_tools": True}),
        ('input_tokens: ">= 500"', {}, {"input_tokens_estimate": 499}),
        ('input_tokens: "<= 500"', {}, {"input_tokens_estimate": 501}),
        ('input_tokens: ">= 400 and <= 600"', {"input_tokens_estimate": 600}, {"input_tokens_estimate": 601}),
        ("not: {tag: [x, y]}", {}, {"tags": frozenset({"a", "y"})}),
        ("not: {tenant: other, needs: tools}", {}, {"needs_tools": True}),
        ("not: {tenant: other, needs: tools}", {}, {"tenant": "other"}),
        ('not: {input_tokens: ">= 600", key: x}', {"input_tokens_estimate": 599}, {"input_tokens_estimate": 600}),
        ('not: {input_tokens: "<= 99"}', {"input_tokens_estimate": 100}, {"input_tokens_estimate": 99}),
        ("tag: a, tenant: acme, key: ci, team: red", {}, {"key": "x"}),
        ("schedule: {days: mon-tue}", {"at_ms": moment("2026-11-24T23:59")}, {"at_ms": moment("2026-11-25T00:00")}),
    ],
)
def test_a_condition_takes_what_it_says(condition: str, taken: dict[str, Any], left: dict[str, Any]) -> None:
    of = policy(condition)
    assert route(of, replace(ASKED, **taken)) == "r0"
    assert route(of, replace(ASKED, **left)) == "rest"


BERLIN = Schedule(frozenset(range(5)), ((22 * 60, 6 * 60), (12 * 60, 13 * 60)), "Europe/Berlin")


@pytest.mark.parametrize(
    ("local", "within"),
    [
        ("2026-11-23T12:00", True),
        ("2026-11-23T13:00", False),
        ("2026-11-23T05:59", False),  # a Monday: the night before belongs to Sunday
        ("2026-11-27T22:00", True),
        ("2026-11-28T05:59", True),  # a Saturday: Friday's night
        ("2026-11-28T06:00", False),
        ("2026-11-28T22:00", False),
        ("2026-07-06T12:30", True),
    ],
)
def test_a_schedule_is_read_on_its_own_clocks(local: str, within: bool) -> None:
    assert BERLIN.holds(moment(local, "Europe/Berlin")) is within


def test_a_schedule_follows_the_change_of_clocks() -> None:
    noon = Schedule(frozenset(range(7)), ((12 * 60, 13 * 60),), "Europe/Berlin")
    assert [noon.holds(moment(text)) for text in ("2026-03-28T11:00", "2026-03-29T11:00", "2026-03-29T10:00")] == [
        True, False, True,
    ]  # fmt: skip


def test_a_share_keeps_sessions_whole_and_grows_without_dropping_any() -> None:
    tenth, third = policy("share: 10%"), policy("share: 33%")
    sessions = [f"session {number}" for number in range(5000)]
    inside = [s for s in sessions if route(tenth, replace(ASKED, session=s)) == "r0"]
    assert 0.08 < len(inside) / len(sessions) < 0.12
    assert all(route(third, replace(ASKED, session=s, id=s[::-1], run="x")) == "r0" for s in inside)
    by_request = [route(tenth, replace(ASKED, id=f"req_{number}")) for number in range(2000)]
    assert 0.07 < by_request.count("r0") / 2000 < 0.13
    by_run = {route(tenth, replace(ASKED, run="a run", id=f"req_{number}")) for number in range(100)}
    assert len(by_run) == 1


def test_two_routes_draw_different_shares() -> None:
    queries = [replace(ASKED, session=str(number)) for number in range(4000)]
    first = [bucket(query, "canary") < 0.5 for query in queries]
    second = [bucket(query, "trial") < 0.5 for query in queries]
    both = sum(a and b for a, b in zip(first, second, strict=True))
    assert 0.22 < both / len(queries) < 0.28


@pytest.mark.parametrize(
    ("condition", "holds_for_named"),
    [
        ("tag: a", True),
        ("key: ci", True),
        ("team: red", True),
        ("not: {team: blue}", True),
        ("share: 100%, endpoint: chat.completions", False),
        ("schedule: {days: sun-sat}", False),
        ("not: {model: x}", False),
    ],
)
def test_who_asks_binds_a_named_model_and_circumstances_do_not(condition: str, holds_for_named: bool) -> None:
    of = policy(condition)
    assert route(of, ASKED) == "r0"
    assert route(of, replace(ASKED, model="n")) == ("r0" if holds_for_named else None)


NIGHT = "tag: a, schedule: {hours: 22:00-06:00}"
OFFICE = "schedule: {days: mon-fri, hours: 09:00-17:00, zone: Europe/Berlin}"


@pytest.mark.parametrize(
    ("conditions", "problem"),
    [
        (["tag: a, " + OFFICE, "tag: [a]"], None),
        (["tag: a", "tag: a, " + OFFICE], "already taken by `r0`"),
        (["tag: a, " + OFFICE, "tag: a, schedule: {days: tue, hours: 10:00-11:00, zone: Europe/Berlin}"], "by `r0`"),
        (["tag: a, schedule: {days: mon-fri}", "tag: a, schedule: {days: sat-sun}", "tag: a"], "`r0` and `r1`"),
        ([NIGHT, "tag: a, schedule: {hours: 06:00-22:00}", "tag: a"], "`r0` and `r1`"),
        ([NIGHT, "tag: a, schedule: {hours: 06:00-21:59}", "tag: a"], None),
        # 12:00 in Rome is not always 11:00 in UTC
        (["tag: a, schedule: {hours: 11:00-12:00}", "tag: a, schedule: {hours: 12:00-13:00, zone: Europe/Rome}"], None),
        (["tag: a, share: 50%", "tag: a, share: 50%", "tag: a"], None),
        (["tag: a", "tag: a, share: 50%"], "already taken by `r0`"),
        (["tag: a, share: 100%", "tag: a"], "already taken by `r0`"),
        (['tag: a, input_tokens: "<= 99"', 'tag: a, input_tokens: ">= 100"', "tag: a"], "`r0` and `r1`"),
        (['tag: a, input_tokens: "<= 99"', 'tag: a, input_tokens: ">= 101"', "tag: a"], None),
        (["tag: a, endpoint: [completions, embeddings]", "tag: a, endpoint: chat.completions", "tag: a"], "`r1`"),
        (["tag: a, needs: tools", "tag: a, not: {needs: tools}", "tag: a"], "`r0` and `r1`"),
        (["tag: a, not: {tag: b}", "tag: a"], None),
        (["tag: a, not: {tag: b}", "tag: b", "tag: a"], "`r0` and `r1`"),
        (["not: {team: red}", "team: red", "tag: a"], "`r0` and `r1`"),
        (["tag: a, not: {tag: a}"], "never hold together"),
        (["team: red, not: {team: [red, blue]}"], "never hold together"),
        ([OFFICE + ", not: {schedule: {zone: Europe/Berlin, days: mon-fri}}"], "never hold together"),
    ],
)  # fmt: skip
def test_what_nothing_can_come_to_is_said(conditions: list[str], problem: str | None) -> None:
    if problem is None:
        policy(*conditions)
        return
    with pytest.raises(PolicyError) as caught:
        policy(*conditions)
    (found,) = caught.value.problems
    assert problem in found.message
    assert (found.line, found.field) == (6 + len(conditions), f"routes[{len(conditions) - 1}].when")


def some(*values: str) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(st.sampled_from(values), max_size=2)


SCHEDULES = st.builds(
    Schedule,
    st.frozensets(st.integers(0, 6), min_size=1, max_size=6),
    st.sampled_from([((0, 1440),), ((540, 1020),), ((1320, 360),), ((0, 720), (720, 1440))]),
    st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata"]),
)
TOKENS = st.sampled_from([{}, {"least_tokens": 100}, {"most_tokens": 99}, {"least_tokens": 50, "most_tokens": 150}])


def conditions(**more: Any) -> st.SearchStrategy[When]:
    build: Callable[..., When] = lambda tokens, **rest: When(**tokens, **rest)  # noqa: E731
    return st.builds(
        build, tokens=TOKENS, tags=some("a", "b"), tenants=some("t", "u"), needs=some("tools", "format"),
        schedule=st.none() | SCHEDULES, **more,
    )  # fmt: skip


QUERIES = st.builds(
    Query,
    st.just("auto"),
    st.sampled_from(["t", "u", "v"]),
    st.sampled_from([0, 49, 50, 99, 100, 150, 151]),
    st.none(),
    tags=st.frozensets(st.sampled_from("abc")),
    needs_tools=st.booleans(),
    needs_format=st.booleans(),
    at_ms=st.integers(moment("2026-01-01"), moment("2026-12-31")),
)


@settings(deadline=None, max_examples=60)
@given(conditions(), st.lists(conditions(none_of=st.none() | conditions()), max_size=3), st.lists(QUERIES, min_size=20))
def test_what_is_called_unreachable_is(last: When, earlier: list[When], queries: list[Query]) -> None:
    takers = takers_of(last, [(str(index), when) for index, when in enumerate(earlier)])
    if takers is not None:
        assert not any(last.holds(query) and not any(when.holds(query) for when in earlier) for query in queries)
