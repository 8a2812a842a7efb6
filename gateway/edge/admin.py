"""The admin API: keys, budgets, spend, prices, policy. For keys of the role admin alone.

What changes a key is rate-limited and leaves a line in the log that names who did it (`admin.key_created`, …). A key's
secret is in one answer only, that of its creation; its hash is in none.
"""

import asyncio
import time
from collections import OrderedDict, deque
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from gateway.admission.keys import NAME_PATTERN, KeyNameError, KeyNameTaken, Principal, Role
from gateway.edge import answers
from gateway.edge.budgets import budgets_of, shown
from gateway.edge.caller import Caller, TheLifecycle, TheState
from gateway.edge.openapi import refusals
from gateway.edge.refused import TextRoute
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, RateLimited, Unavailable
from gateway.ledger import prices
from gateway.ledger.spend import By, spend_by
from gateway.telemetry.logs import get_logger
from routers.errors import PolicyError
from routers.units import Budget, UnitError, format_money, parse_budget

log = get_logger(__name__)

MAX_CHANGES = 60
CHANGES_PER_S = 60.0
"""One admin key changes at most MAX_CHANGES keys in so many seconds."""
MAX_ROWS = 1000
_MAX_ADMINS = 10_000

router = APIRouter(route_class=TextRoute, prefix="/leadline/v1/admin", tags=["admin"], responses=refusals(403))


async def administrator(principal: Caller) -> Principal:
    """The caller, if it is an admin. Raises Forbidden."""
    if principal.role != "admin":
        raise Forbidden(f"Key {principal.key_name} has the role {principal.role}; this path is for admins.")
    return principal


Admin = Annotated[Principal, Depends(administrator)]


class ChangeRate:
    """How often each admin may change something, in this worker."""

    def __init__(self) -> None:
        self._changes: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, key_id: str, now_s: float) -> None:
        """Raises RateLimited."""
        changes = self._changes.setdefault(key_id, deque(maxlen=MAX_CHANGES))
        self._changes.move_to_end(key_id)
        if len(changes) == MAX_CHANGES and now_s - changes[0] < CHANGES_PER_S:
            raise RateLimited(
                f"At most {MAX_CHANGES} changes of keys in {CHANGES_PER_S:g} s for one admin.",
                retry_after_s=CHANGES_PER_S - (now_s - changes[0]),
            )
        changes.append(now_s)
        if len(self._changes) > _MAX_ADMINS:
            self._changes.popitem(last=False)


async def changer(request: Request, principal: Admin) -> Principal:
    """An admin who may change one more key now. Raises RateLimited."""
    rate: ChangeRate = request.app.state.change_rate
    rate.admit(principal.key_id, time.monotonic())
    return principal


Changer = Annotated[Principal, Depends(changer)]


KeyName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
BudgetText = Annotated[
    str,
    WithJsonSchema({"type": "string", "pattern": r"^\$[0-9]{1,9}(\.[0-9]{1,9})?/(hour|day|week|month|total)$"}),
]
"""Both are checked where they are used, in words that name the fix."""


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: KeyName
    tenant: KeyName = "default"
    team: KeyName | None = None
    role: Role = "user"
    budget: BudgetText | None = Field(default=None, examples=["$5/month"])


class KeyEdit(BaseModel):
    """What is left out stays as it is; `null` takes a team or a budget away."""

    model_config = ConfigDict(extra="forbid", strict=True)

    team: KeyName | None = None
    role: Role | None = None
    budget: BudgetText | None = Field(default=None, examples=["$5/month"])


@router.get("/keys", response_model=answers.KeyList)
async def list_keys(admin: Admin, lifecycle: TheLifecycle) -> dict[str, Any]:
    """Every key that works, without its secret."""
    return {"data": [_key(principal) for principal in sorted(lifecycle.keys.all(), key=lambda p: p.key_name)]}


@router.post("/keys", status_code=201, response_model=answers.CreatedKey, responses=refusals(409, 413, 415, 429))
async def create_key(body: NewKey, admin: Changer, lifecycle: TheLifecycle) -> dict[str, Any]:
    """Make a key. `key` in the answer is the only time that it is shown."""
    budget = _budget(body.budget)
    try:
        token = await asyncio.to_thread(
            lifecycle.keys.create,
            body.name,
            tenant=body.tenant,
            team=body.team,
            role=body.role,
            budget_nanousd=budget.nanousd if budget is not None else None,
            budget_window=budget.window if budget is not None else "month",
        )
    except KeyNameTaken as error:
        raise Conflict(f"{error}.", param="name") from error
    except KeyNameError as error:
        raise InvalidRequest(f"{error}.") from error
    made = lifecycle.keys.authenticate(token)
    log.info("admin.key_created", actor=admin.key_id, **_key(made))
    return {**_key(made), "key": token}


@router.patch("/keys/{key_id}", response_model=answers.Key, responses=refusals(404, 409, 413, 415, 429))
async def edit_key(key_id: str, body: KeyEdit, admin: Changer, lifecycle: TheLifecycle) -> dict[str, Any]:
    """Give a key another role, team or budget. Requests under way keep what they were admitted with."""
    before = _found(lifecycle.keys.find(key_id), key_id)
    given = body.model_fields_set
    if before.key_id == admin.key_id and body.role not in (None, "admin"):
        raise Conflict("role: an admin cannot take its own rights away; another admin can.", param="role")
    budget = _budget(body.budget)
    kept = (before.budget_nanousd, before.budget_window)
    nanousd, window = ((budget.nanousd, budget.window) if budget else (None, None)) if "budget" in given else kept
    try:
        changed = await asyncio.to_thread(
            lifecycle.keys.change,
            key_id,
            role=body.role or before.role,
            team=body.team if "team" in given else before.team,
            budget_nanousd=nanousd,
            budget_window=window,
        )
    except KeyNameError as error:
        raise InvalidRequest(f"{error}.") from error
    after = _key(_found(changed, key_id))
    log.info("admin.key_changed", actor=admin.key_id, before=_key(before), **after)
    return after


@router.delete("/keys/{key_id}", status_code=204, responses=refusals(404, 409, 429))
async def revoke_key(key_id: str, admin: Changer, lifecycle: TheLifecycle) -> Response:
    """End a key for good; every worker refuses it within a second."""
    if key_id == admin.key_id:
        raise Conflict("key: an admin cannot revoke the key it uses; another admin can.")
    if not await asyncio.to_thread(lifecycle.keys.revoke, key_id):
        raise _no_key(key_id)
    log.info("admin.key_revoked", actor=admin.key_id, key_id=key_id)
    return Response(status_code=204)


@router.get("/budgets", response_model=answers.BudgetPage, responses=refusals(503))
async def list_budgets(
    admin: Admin, lifecycle: TheLifecycle, after: str = "", limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 200
) -> dict[str, Any]:
    """The budgets of up to `limit` keys, with their teams and tenants, as they stand; and those of runs in use.

    `next` is the key name to continue `after`, and null at the end.
    """
    keys = sorted((p for p in lifecycle.keys.all() if p.key_name > after), key=lambda p: p.key_name)
    found = await budgets_of(lifecycle, keys[:limit])
    runs = [budget for budget in lifecycle.budgets.all() if budget.scope.startswith("scope:")] if not after else []
    return {
        "data": [shown(budget) for budget in (*found, *runs)],
        "next": keys[limit - 1].key_name if len(keys) > limit else None,
    }


@router.get("/spend", response_model=answers.SpendBy, response_model_exclude_unset=True)
async def spend(
    admin: Admin,
    lifecycle: TheLifecycle,
    by: By = "tenant",
    since_ms: Annotated[int, Query(ge=0, lt=1 << 53)] = 0,
    until_ms: Annotated[int | None, Query(ge=0, lt=1 << 53)] = None,
    tenant: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 200,
) -> dict[str, Any]:
    """Sums of the ledger, dearest first: integers of nano-dollars and tokens, exact."""
    await lifecycle.ledger.flush()
    until = until_ms if until_ms is not None else time.time_ns() // 1_000_000 + 1
    rows = await asyncio.to_thread(
        spend_by, lifecycle.ledger.engine, by, since_ms=since_ms, until_ms=until, limit=limit, tenant=tenant
    )
    return {"by": by, "since_ms": since_ms, "until_ms": until, "data": rows}


@router.get("/prices", response_model=answers.Prices, responses=refusals(503))
async def list_prices(admin: Admin, lifecycle: TheLifecycle) -> dict[str, Any]:
    """What the policy's models cost now, and the price list behind it: nano-dollars per million tokens."""
    try:
        known = await asyncio.to_thread(prices.price_list)
    except PolicyError as error:
        raise Unavailable(f"The price list cannot be read: {error}") from error
    models = lifecycle.world.targets.values()
    return {
        "models": [
            {"model": t.model, "provider": t.provider, "upstream": t.wire_model, "price": t.price} for t in models
        ],
        "source": known.source,
        "data": known.listing(),
    }


@router.get("/policy", response_model=answers.PolicyInForce)
async def policy(admin: Admin, state: TheState) -> dict[str, Any]:
    """The version in force, and what is in it."""
    loaded, reloader = state.lifecycle.world.policy, state.reloader
    return {
        "version": loaded.version_hash,
        "since_ms": reloader.since_ms if reloader is not None else None,
        "refused": reloader.refused if reloader is not None else None,
        "providers": list(loaded.providers),
        "models": list(loaded.models),
        "aliases": list(loaded.aliases),
        "routes": [{"name": route.name, "rule": route.rule} for route in loaded.routes],
        "limits": len(loaded.limits),
    }


def _key(principal: Principal) -> dict[str, Any]:
    return {
        "key_id": principal.key_id,
        "name": principal.key_name,
        "tenant": principal.tenant,
        "team": principal.team,
        "role": principal.role,
        "budget": None
        if principal.budget_nanousd is None
        else f"{format_money(principal.budget_nanousd)}/{principal.budget_window}",
        "budget_nanousd": principal.budget_nanousd,
        "budget_window": principal.budget_window,
    }


def _budget(text: str | None) -> Budget | None:
    try:
        return parse_budget(text) if text is not None else None
    except UnitError as error:
        raise InvalidRequest(f"budget: {error}; {error.fix}.", param="budget") from error


def _found(principal: Principal | None, key_id: str) -> Principal:
    if principal is None:
        raise _no_key(key_id)
    return principal


def _no_key(key_id: str) -> NotFound:
    return NotFound(f"key: {key_id[:60]!r} is not the id of a key that works.")
