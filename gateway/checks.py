"""What `leadline check` adds to the errors: things that load and run, and that their author may not have meant."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.policies import missing_secrets
from routers.cost import costs_nanousd, over_calls
from routers.policy import Model, Policy, Route
from routers.shape import did_you_mean
from routers.types import Cascade, Query
from routers.units import format_money

SHORT_PROMPT = 100
"""Tokens."""


@dataclass(frozen=True, slots=True)
class Callers:
    """Who has a key that works."""

    keys: frozenset[str]
    teams: frozenset[str]
    tenants: frozenset[str]


def callers_of(database_url: str) -> Callers | None:
    """As the ledger has them, which is only read; None: there is no ledger, or not one that can be read."""
    from sqlalchemy import create_engine, select  # not there in the base installation, which can check a policy, too
    from sqlalchemy.exc import DBAPIError
    from sqlmodel import col

    from gateway.ledger.tables import ApiKey

    path = database_url.removeprefix("sqlite:///")
    if path != database_url and not Path(path).exists():
        return None
    engine = create_engine(database_url)
    try:
        with engine.connect() as connection:
            rows = connection.execute(
                select(col(ApiKey.name), col(ApiKey.team), col(ApiKey.tenant)).where(
                    col(ApiKey.revoked_at_ms).is_(None)
                )
            ).all()
    except DBAPIError:
        return None
    finally:
        engine.dispose()
    return Callers(
        frozenset(name for name, _, _ in rows),
        frozenset(team for _, team, _ in rows if team is not None),
        frozenset(tenant for _, _, tenant in rows),
    )


def notes(policy: Policy, callers: Callers | None) -> list[str]:
    """A sentence for each, beginning with its field."""
    found = missing_secrets(policy)
    for index, route in enumerate(policy.routes):
        found += _of_route(policy, route, f"routes[{index}]")
        found += _of_plans(policy, route, f"routes[{index}]")
    budgeted = any(limit.budget is not None for limit in policy.limits)
    for model in policy.models.values():
        if model.price is None and budgeted:
            found.append(
                f"models.{model.name}.price: not used where a budget holds, as it is unpriced; give it a price"
            )
    return found if callers is None else [*found, *_unknown_callers(policy, callers)]


def _of_route(policy: Policy, route: Route, field: str) -> Iterator[str]:
    bounds = route.constraints
    plain = [policy.models[name] for name in route.candidates if name in policy.models]
    if bounds.cost_nanousd is not None and len(plain) == len(route.candidates):
        costs = {model.name: cost for model in plain if (cost := _short_call(model)) is not None}
        if costs and min(costs.values()) > bounds.cost_nanousd:
            cheapest = min(costs, key=lambda name: costs[name])
            yield (
                f"{field}.subject_to.cost: met only by requests with a low max_tokens: an answer of usual length costs "
                f"{format_money(costs[cheapest])} even with {cheapest}; raise it, or add a cheaper model"
            )
    headless = [model.name for model in plain if model.name not in route.heads]
    if bounds.p_success is not None and route.explore is None and headless:
        yield (
            f"{field}.subject_to.p_success: never met by {', '.join(headless)}, which no probe head speaks for; add a "
            "head to signals.difficulty.heads, or leave the candidate out"
        )


def _of_plans(policy: Policy, route: Route, field: str) -> Iterator[str]:
    """Where a model of this route answers without the plan that it has."""
    cascades = [plan for plan in route.plans.values() if isinstance(plan, Cascade)]
    asked = {stage.model for plan in cascades for stage in plan.stages}
    judged = {stage.model for plan in cascades if not plan.accept.agree for stage in plan.stages[:-1]}
    replacing = {*route.on_failure, *(name for names in route.on_cause.values() for name in names)}
    for model in policy.models.values():
        name, over = model.name, any(over_calls(policy, model, plan) for _, plan in model.plans)
        if over and name in replacing:
            yield f"{field}.on_failure: {name} answers without its plan here, as the plan is run over calls"
        if over and name in asked:
            yield f"{field}.candidates: {name} answers without its plan in a cascade, as the plan is run over calls"
        elif model.plans and name in judged:
            yield (
                f"{field}.candidates: {name} answers without its plan where its answer is judged by log probabilities, "
                "which no plan gives; accept by agreement, or leave the plan out"
            )


def _short_call(model: Model) -> int | None:
    return costs_nanousd(model, Query("", "", SHORT_PROMPT, None), SHORT_PROMPT)[0]


def _unknown_callers(policy: Policy, callers: Callers) -> Iterator[str]:
    known = {"key": callers.keys, "team": callers.teams, "tenant": callers.tenants}
    for index, limit in enumerate(policy.limits):
        names = known.get(limit.scope)
        if names is not None and limit.name != "*" and limit.name not in names:
            fix = did_you_mean(limit.name, sorted(names))
            yield f"limits[{index}].{limit.scope}: no key that works has the {_of(limit.scope)} {limit.name!r}; {fix}"
    for index, route in enumerate(policy.routes):
        asked = {"key": route.when.keys, "team": route.when.teams, "tenant": route.when.tenants}
        for scope, names in asked.items():
            for name in sorted(names - known[scope]):
                fix = did_you_mean(name, sorted(known[scope]))
                yield f"routes[{index}].when.{scope}: no key that works has the {_of(scope)} {name!r}; {fix}"


def _of(scope: str) -> str:
    return "name" if scope == "key" else scope
