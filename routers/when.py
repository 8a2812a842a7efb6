"""The conditions of a route: which queries it takes, and at which times."""

from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Literal
from zoneinfo import ZoneInfo

from routers.types import Endpoint, Query

Need = Literal["tools", "format", "logprobs"]
"""What a request needs of a model beside words."""

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES_PER_DAY = 1440


@dataclass(frozen=True, slots=True)
class Schedule:
    """Hours of days, on the clocks of one time zone; where those are put forward or back, so is this."""

    days: frozenset[int]
    """0 is Monday."""
    hours: tuple[tuple[int, int], ...]
    """Minutes of the day, from (inclusive) and to (exclusive). One that does not end after it starts goes on past
    midnight, and belongs to the day it starts on."""
    zone: str
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_zone", ZoneInfo(self.zone))

    def holds(self, at_ms: int) -> bool:
        """Whether this moment (UTC, since the epoch) is within."""
        local = datetime.fromtimestamp(at_ms / 1000, self._zone)
        return self.holds_on(local.weekday(), local.hour * 60 + local.minute)

    def holds_on(self, day: int, minute: int) -> bool:
        """The same for a minute of a day, as the zone's clocks show it."""
        today, yesterday = day in self.days, (day - 1) % 7 in self.days
        return any(
            (today and start <= minute < end)
            if start < end
            else (today and minute >= start) or (yesterday and minute < end)
            for start, end in self.hours
        )

    def __str__(self) -> str:
        days = ", ".join(DAYS[day] for day in sorted(self.days)) if len(self.days) < 7 else "every day"
        whole = self.hours == ((0, MINUTES_PER_DAY),)
        spans = "" if whole else " " + ", ".join(f"{_clock(start)}-{_clock(end)}" for start, end in self.hours)
        return f"{days}{spans} {self.zone}"


@dataclass(frozen=True, slots=True)
class When:
    """Conditions that must all hold; within one, any of its values. Empty: no condition."""

    tags: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    """Names of keys."""
    teams: frozenset[str] = frozenset()
    endpoints: frozenset[Endpoint] = frozenset()
    needs: frozenset[Need] = frozenset()
    least_tokens: int = 0
    """Of the prompt, as estimated; inclusive, as the next."""
    most_tokens: int | None = None
    schedule: Schedule | None = None
    share: float = 1.0
    """Of conversations: see `bucket`."""
    salt: str = ""
    """What `share` draws with: the route's name, so that two routes do not draw the same ones."""
    none_of: "When | None" = None
    """None of these may hold. It has no share and no exceptions of its own."""
    beyond_names: bool = field(init=False, compare=False)
    """Whether there is a condition beside tags, models and tenants."""
    binds_named: bool = field(init=False, compare=False)
    """Whether a request that names a model of the policy has to keep to it: it says who asks, or carries a tag."""

    def __post_init__(self) -> None:
        beyond = bool(
            self.keys
            or self.teams
            or self.endpoints
            or self.needs
            or self.least_tokens
            or self.most_tokens is not None
            or self.schedule is not None
            or self.share < 1
            or self.none_of is not None
        )
        who = self.tags or self.tenants or self.keys or self.teams
        object.__setattr__(self, "beyond_names", beyond)
        object.__setattr__(self, "binds_named", bool(who or (self.none_of is not None and self.none_of.binds_named)))

    def __bool__(self) -> bool:
        return bool(self.tags or self.models or self.tenants or self.beyond_names)

    def holds(self, query: Query) -> bool:
        """Whether all of it holds."""
        return not (
            (self.models and query.model not in self.models)
            or (self.tenants and query.tenant not in self.tenants)
            or (self.tags and self.tags.isdisjoint(query.tags))
            or not self.rest_holds(query)
        )

    def rest_holds(self, query: Query) -> bool:
        """Whether all holds that is asked beside tags, models and tenants."""
        return not (
            (self.keys and query.key not in self.keys)
            or (self.teams and query.team not in self.teams)
            or (self.endpoints and query.endpoint not in self.endpoints)
            or (self.needs and self.needs.isdisjoint(needs_of(query)))
            or not self.takes_length(query)
            or (self.none_of is not None and self.none_of.any_holds(query))
            or (self.schedule is not None and not self.schedule.holds(query.at_ms))
            or (self.share < 1 and bucket(query, self.salt) >= self.share)
        )

    def takes_length(self, query: Query) -> bool:
        """Whether the prompt is as long as asked."""
        tokens = query.input_tokens_estimate
        return tokens >= self.least_tokens and (self.most_tokens is None or tokens <= self.most_tokens)

    def any_holds(self, query: Query) -> bool:
        """Whether one of its conditions holds."""
        bounded = self.least_tokens > 0 or self.most_tokens is not None
        return (
            query.model in self.models
            or query.tenant in self.tenants
            or not self.tags.isdisjoint(query.tags)
            or query.key in self.keys
            or query.team in self.teams
            or query.endpoint in self.endpoints
            or not self.needs.isdisjoint(needs_of(query))
            or (bounded and self.takes_length(query))
            or (self.schedule is not None and self.schedule.holds(query.at_ms))
        )


def needs_of(query: Query) -> frozenset[Need]:
    """What the request needs of a model beside words."""
    asked: tuple[tuple[Need, bool], ...] = (
        ("tools", query.needs_tools),
        ("format", query.needs_format),
        ("logprobs", query.needs_logprobs),
    )
    return frozenset([need for need, needed in asked if needed])


def bucket(query: Query, salt: str) -> float:
    """Where this query falls in [0, 1), for shares: the same for every request of a session (where there is none, of a
    run; where there is none, the request by itself), and independent of what other salts say of it. A share that grows
    keeps whom it had."""
    unit = query.session or query.run or query.id
    digest = blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "big") / (1 << 64)


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"
