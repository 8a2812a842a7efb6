"""Which routes of a policy no request can come to.

A route is asked about with witnesses: queries that stand for all others, one for each way in which the conditions up to
it can tell two queries apart. Where each witness that it takes is taken before, so is everything.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import chain, combinations, product
from typing import get_args
from zoneinfo import ZoneInfo

from msgspec.structs import replace as changed

from routers.types import Endpoint, Query
from routers.when import Need, Schedule, When

MAX_WITNESSES = 5_000
"""Beyond this many a route is taken to be reachable: a wrong error would be worse than a missed one."""
MAX_EXCLUDED_TAGS = 6
_ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
_NEEDS: tuple[Need, ...] = get_args(Need)
_ELSE = "\0"
"""A name that no condition has."""
_WEEKS = (datetime(2026, 1, 5), datetime(2026, 7, 6))
"""Mondays whose weeks have no change of clocks, one in the winter and one in the summer of each half of the earth."""


def takers_of(when: When, earlier: Sequence[tuple[str, When]]) -> list[str] | None:
    """The earlier routes that together take every query that `when` holds for, by name; None: some query is left.

    An empty list: `when` holds for no query at all.
    """
    asked = replace(when, share=1.0)
    certain = [(name, condition) for name, condition in earlier if condition.share >= 1]
    takers: set[str] = set()
    witnesses = _witnesses(asked, [condition for _, condition in certain])
    if witnesses is None:
        return None
    for query in witnesses:
        if not asked.holds(query):
            continue
        taker = next((name for name, condition in certain if condition.holds(query)), None)
        if taker is None:
            return None
        takers.add(taker)
    return [name for name, _ in certain if name in takers]


def _witnesses(when: When, earlier: Sequence[When]) -> Iterator[Query] | None:
    """One query for each combination of what the conditions can tell apart; None: too many."""
    exceptions = [condition.none_of for condition in earlier if condition.none_of is not None]
    every = [when, *([when.none_of] if when.none_of else []), *earlier, *exceptions]
    excluded = sorted({tag for condition in exceptions for tag in condition.tags})
    if len(excluded) > MAX_EXCLUDED_TAGS:
        return None
    tags = _tag_sets(when.tags, excluded)
    models = _names(when.models, (condition.models for condition in exceptions))
    tenants = _names(when.tenants, (condition.tenants for condition in exceptions))
    keys = _names(when.keys, (condition.keys for condition in exceptions))
    teams = _names(when.teams, (condition.teams for condition in exceptions))
    endpoints = _ENDPOINTS if any(condition.endpoints for condition in every) else _ENDPOINTS[:1]
    needs = _subsets(_NEEDS) if any(condition.needs for condition in every) else [()]
    tokens = _token_counts(every)
    moments = _moments([condition.schedule for condition in every if condition.schedule is not None])
    if math.prod(map(len, (tags, models, tenants, keys, teams, endpoints, needs, tokens, moments))) > MAX_WITNESSES:
        return None
    callers = (
        Query(model, tenant, 0, None, tags=carried, key=key, team=team)
        for tenant, key, team, carried, model in product(tenants, keys, teams, tags, models)
    )
    return (
        changed(
            caller, input_tokens_estimate=count, endpoint=endpoint, at_ms=at_ms, needs_tools="tools" in asked,
            needs_format="format" in asked, needs_logprobs="logprobs" in asked,
        )
        for caller in callers
        for endpoint, asked, count, at_ms in product(endpoints, needs, tokens, moments)
    )  # fmt: skip


def _names(own: frozenset[str], excluded: Iterable[frozenset[str]]) -> list[str]:
    """A name that no condition has is taken by whatever takes any name, but for those that name exceptions."""
    return sorted(own) or [*sorted(set(chain.from_iterable(excluded))), _ELSE]


def _tag_sets(own: frozenset[str], excluded: Sequence[str]) -> list[frozenset[str]]:
    """One tag of those asked for, with any of those that some route excludes: with more, more routes take it."""
    return [frozenset((tag, *some)) for tag in sorted(own) or [_ELSE] for some in _subsets(excluded)]


def _subsets(values: Sequence[str]) -> list[tuple[str, ...]]:
    return [some for count in range(len(values) + 1) for some in combinations(values, count)]


def _token_counts(conditions: Iterable[When]) -> list[int]:
    edges = {0}
    for condition in conditions:
        edges.add(condition.least_tokens)
        if condition.most_tokens is not None:
            edges.add(condition.most_tokens + 1)
    return sorted(edges)


def _moments(schedules: Sequence[Schedule]) -> list[int]:
    """One moment for each combination of schedules that hold at a time, as far as two weeks show."""
    found: dict[tuple[bool, ...], int] = {}
    for schedule in schedules:
        zone = ZoneInfo(schedule.zone)
        minutes = {0, *chain.from_iterable(schedule.hours)}
        for week, day, minute in product(_WEEKS, range(-1, 8), minutes):
            local = (week + timedelta(days=day, minutes=minute)).replace(tzinfo=zone)
            at_ms = int(local.timestamp() * 1000)
            found.setdefault(tuple([other.holds(at_ms) for other in schedules]), at_ms)
    return [*found.values()] or [0]
