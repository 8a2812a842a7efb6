"""The conditions of a route as a policy file has them: their shape, and what it means."""

from dataclasses import replace

from pydantic import Field

from routers.fields import (
    DaysOrMany,
    EndpointOrMany,
    HoursOrMany,
    NameOrNames,
    NeedOrMany,
    Share,
    TokenRange,
    Zone,
)
from routers.shape import Strict
from routers.when import MINUTES_PER_DAY, Schedule, When


class ScheduleFile(Strict):
    """Hours of days, on the clocks of a time zone. Hours past midnight belong to the day they start on."""

    days: DaysOrMany | None = None
    """Default: every day."""
    hours: HoursOrMany | None = None
    """Default: all day."""
    zone: Zone = "UTC"
    """IANA name. Default: UTC."""


class ConditionsFile(Strict):
    """Conditions of a route. A list means any of its values."""

    tag: NameOrNames | None = None
    model: NameOrNames | None = None
    """The name that the caller asks for."""
    tenant: NameOrNames | None = None
    key: NameOrNames | None = None
    """The name of the caller's key, never the key."""
    team: NameOrNames | None = None
    endpoint: EndpointOrMany | None = None
    needs: NeedOrMany | None = None
    """What the request needs of a model beside words."""
    input_tokens: TokenRange | None = None
    """Of the prompt, as estimated."""
    schedule: ScheduleFile | None = None


class WhenFile(ConditionsFile):
    """Conditions, all of which must hold. A list means any of its values."""

    share: Share | None = None
    """Of conversations: the same session, or else the same agent run, is always in or always out."""
    not_: ConditionsFile | None = Field(default=None, alias="not")
    """None of these may hold."""


def when_of(part: WhenFile | None, route: str) -> When:
    """The conditions of the route of this name."""
    if part is None:
        return When()
    none_of = None if part.not_ is None else _conditions(part.not_)
    return replace(_conditions(part), share=part.share or 1.0, salt=route, none_of=none_of)


def _conditions(part: ConditionsFile) -> When:
    least, most = part.input_tokens or (0, None)
    return When(
        tags=frozenset(part.tag or ()),
        models=frozenset(part.model or ()),
        tenants=frozenset(part.tenant or ()),
        keys=frozenset(part.key or ()),
        teams=frozenset(part.team or ()),
        endpoints=frozenset(part.endpoint or ()),
        needs=frozenset(part.needs or ()),
        least_tokens=least,
        most_tokens=most,
        schedule=None if part.schedule is None else _schedule(part.schedule),
    )


def _schedule(part: ScheduleFile) -> Schedule:
    days = frozenset[int]().union(*part.days) if part.days is not None else frozenset(range(7))
    return Schedule(days, tuple(sorted(part.hours)) if part.hours else ((0, MINUTES_PER_DAY),), part.zone)
