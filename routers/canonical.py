"""What the version of a policy is made of."""

from dataclasses import asdict

from msgspec import to_builtins

from routers.policy import Route
from routers.when import When


def canonical(route: Route) -> dict[str, object]:
    """A route as the policy's version counts it: what means the same is the same."""
    return {
        "name": route.name,
        "when": _canonical_when(route.when),
        "use": route.use,
        "candidates": route.candidates,
        "objective": route.objective,
        "constraints": asdict(route.constraints),
        "otherwise": route.otherwise,
        "on_failure": route.on_failure,
        "on_cause": dict(route.on_cause),
        "cache_ttl_ms": route.cache_ttl_ms,
        "deadline_ms": route.deadline_ms,
        "hedge": route.hedge and asdict(route.hedge),
        "on_stream_failure": route.on_stream_failure,
        "worth": route.worth and asdict(route.worth),
        "threshold": route.threshold,
        "explore": route.explore and asdict(route.explore),
        "affinity": route.affinity and asdict(route.affinity),
        "effort": route.effort,
        "priority": route.priority,
        "plans": {name: to_builtins(plan) for name, plan in route.plans.items()},
        "guarantee": route.guarantee and asdict(route.guarantee),
        "shadow": route.shadow and asdict(route.shadow),
    }


def _canonical_when(when: When) -> dict[str, object]:
    schedule = when.schedule
    return {
        "names": [sorted(names) for names in (when.tags, when.models, when.tenants, when.keys, when.teams)],
        "endpoints": sorted(when.endpoints),
        "needs": sorted(when.needs),
        "tokens": [when.least_tokens, when.most_tokens],
        "schedule": schedule and [sorted(schedule.days), schedule.hours, schedule.zone],
        "share": when.share,
        "none_of": _canonical_when(when.none_of) if when.none_of is not None else None,
    }
