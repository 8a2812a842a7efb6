"""Why a request came to the route it came to: each route before it, and the condition that did not hold, in words."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

from routers.policy import Policy
from routers.types import Query
from routers.when import DAYS, When, bucket, needs_of


class RouteFact(NamedTuple):
    """What became of one route."""

    route: str
    taken: bool
    why: str
    """The first condition that does not hold; of the one taken, all its conditions."""

    def __str__(self) -> str:
        return f"route {self.route}: {'taken' if self.taken else 'not taken'}: {self.why}"


def route_facts(policy: Policy, query: Query) -> list[RouteFact]:
    """The routes in order, up to the one that takes the query; where none does, all of them."""
    found = []
    taken = policy.route_for(query)
    for route in policy.routes:
        if route is taken:
            found.append(
                RouteFact(route.name, True, "; ".join(_conditions(route.when, query)) or "takes every request")
            )
            break
        found.append(RouteFact(route.name, False, why_not(route.when, query, query.model in policy.models)))
    return found


def why_not(when: When, query: Query, names_a_model: bool = False) -> str:
    """The first condition that does not hold, in words; empty: all of them do."""
    if names_a_model and not when.models and not when.binds_named:
        return f"{query.model} is a model, and goes straight to it"
    for value, names, what in _names(query, when):
        if names and value not in names:
            return f"{what} is {value or 'not known'}, asked: {_any(names)}"
    if when.tags and when.tags.isdisjoint(query.tags):
        return f"tags: {_any(query.tags) or 'none'}, asked: {_any(when.tags)}"
    if when.needs and when.needs.isdisjoint(needs_of(query)):
        return f"needs {_any(needs_of(query)) or 'nothing but words'}, asked: {_any(when.needs)}"
    tokens = query.input_tokens_estimate
    if tokens < when.least_tokens or (when.most_tokens is not None and tokens > when.most_tokens):
        return f"about {tokens} tokens of prompt, asked: {_range(when)}"
    if when.none_of is not None and when.none_of.any_holds(query):
        return f"excepted: {'; '.join(_holding(when.none_of, query))}"
    if when.schedule is not None and not when.schedule.holds(query.at_ms):
        return f"at {_local(query, when.schedule.zone)}, asked: {when.schedule}"
    if when.share < 1 and (at := bucket(query, when.salt)) >= when.share:
        return f"its {_unit(query)} falls at {100 * at:.2f}%, outside the share of {100 * when.share:g}%"
    return ""


def _conditions(when: When, query: Query) -> Iterator[str]:
    for value, names, what in _names(query, when):
        if names:
            yield f"{what} is {value}"
    if when.tags:
        yield f"tag {_any(when.tags & query.tags)}"
    if when.needs:
        yield f"needs {_any(when.needs & needs_of(query))}"
    if when.least_tokens or when.most_tokens is not None:
        yield f"about {query.input_tokens_estimate} tokens of prompt, {_range(when)}"
    if when.schedule is not None:
        yield f"at {_local(query, when.schedule.zone)}, within {when.schedule}"
    if when.share < 1:
        at = 100 * bucket(query, when.salt)
        yield f"its {_unit(query)} falls at {at:.2f}%, in the share of {100 * when.share:g}%"


def _holding(none_of: When, query: Query) -> Iterator[str]:
    for value, names, what in _names(query, none_of):
        if value in names:
            yield f"{what} is {value}"
    if tags := none_of.tags & query.tags:
        yield f"tag {_any(tags)}"
    if needs := none_of.needs & needs_of(query):
        yield f"needs {_any(needs)}"
    if (none_of.least_tokens or none_of.most_tokens is not None) and none_of.takes_length(query):
        yield f"about {query.input_tokens_estimate} tokens of prompt, {_range(none_of)}"
    if none_of.schedule is not None and none_of.schedule.holds(query.at_ms):
        yield f"at {_local(query, none_of.schedule.zone)}, within {none_of.schedule}"


def _names(query: Query, when: When) -> tuple[tuple[str | None, frozenset[str], str], ...]:
    return (
        (query.model, when.models, "the model asked for"),
        (query.tenant, when.tenants, "the tenant"),
        (query.key, when.keys, "the key"),
        (query.team, when.teams, "the team"),
        (query.endpoint, frozenset(when.endpoints), "the endpoint"),
    )


def _any(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _range(when: When) -> str:
    bounds = [f">= {when.least_tokens}"] if when.least_tokens else []
    return " and ".join(bounds if when.most_tokens is None else [*bounds, f"<= {when.most_tokens}"])


def _local(query: Query, zone: str) -> str:
    local = datetime.fromtimestamp(query.at_ms / 1000, ZoneInfo(zone))
    return f"{DAYS[local.weekday()]} {local:%H:%M}"


def _unit(query: Query) -> str:
    return "session" if query.session else "run" if query.run else "request"
