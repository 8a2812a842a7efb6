"""Everything beside the data plane: models, health, metrics, receipts, spend, explain; described in /openapi.json."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import RedirectResponse
from msgspec.structs import replace
from pydantic import BaseModel, ConfigDict, Field

from gateway import __version__
from gateway.admission.keys import Principal
from gateway.admission.limits import MAX_PATH, RUN_PATTERN
from gateway.edge import answers
from gateway.edge.admin import ChangeRate
from gateway.edge.admin import router as admin_router
from gateway.edge.budgets import budgets_of, shown
from gateway.edge.caller import Caller, TheLifecycle, TheState
from gateway.edge.headers import read_headers
from gateway.edge.openapi import completed, refusals
from gateway.edge.refused import TextRoute, tell_refusals
from gateway.edge.state import State
from gateway.edge.wire import read_chat
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.ledger import outcomes, report
from gateway.ledger.store import BATCH_WAIT_S
from gateway.query import query_of
from routers.explain import from_dict, to_dict, to_lines
from routers.facts import route_facts

MAX_HOURS = 1e6
"""Older than any ledger."""
OTHER_WORKERS_TRIES = 5
"""How many of the ledger's batches a receipt may wait for, when another worker may have it."""

FIRST_MODEL = {"operationId": "model", "parameters": {"name": "$response.body#/data/0/id"}}

router = APIRouter(route_class=TextRoute)
_Found = TypeVar("_Found")


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/dashboard")


@router.get(
    "/v1/models",
    tags=["openai"],
    response_model=answers.ModelList,
    responses={**refusals(), 200: {"links": {"model": FIRST_MODEL}}},
)
async def models(principal: Caller, lifecycle: TheLifecycle) -> dict[str, Any]:
    """The policy's models and aliases, in OpenAI's shape."""
    policy = lifecycle.world.policy
    owners = [(alias, "leadline") for alias in policy.aliases]
    owners += [(model.name, model.provider) for model in policy.models.values()]
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in owners],
    }


@router.get(
    "/v1/models/{name:path}",
    tags=["openai"],
    operation_id="model",
    response_model=answers.ModelEntry,
    responses=refusals(404),
)
async def model(name: str, principal: Caller, lifecycle: TheLifecycle) -> dict[str, Any]:
    for entry in (await models(principal, lifecycle))["data"]:
        if entry["id"] == name:
            return dict(entry)
    raise NotFound(f"model: {name[:100]!r} is not in the policy.", param="model")


@router.get(
    "/leadline/v1/requests/{request_id}",
    tags=["receipts"],
    operation_id="receipt",
    response_model=answers.Receipt,
    responses=refusals(404),
)
async def receipt(request_id: str, principal: Caller, state: TheState) -> dict[str, Any]:
    """One request's receipt: its row, its attempts, its decision. Only the caller's own tenant's (admins: any)."""
    engine, tenant = state.lifecycle.ledger.engine, _scope(principal)
    row, attempts = await _in_ledger(request_id, state, lambda: report.request(engine, request_id, tenant=tenant))
    decision, plan = row.pop("decision"), row.pop("plan")
    said = await asyncio.to_thread(outcomes.of_request, engine, request_id)
    whole = _whole(decision) if decision else None
    did = msgspec.json.decode(plan) if plan else None
    return {
        **row,
        "plan": did,
        "decision": whole,
        "attempt_rows": attempts,
        "feedback": [_outcome(found) for found in said],
    }


async def _in_ledger(request_id: str, state: State, look: Callable[[], _Found | None]) -> _Found:
    """What `look` (blocking) finds of a request that this worker, or another one, has served. Raises NotFound."""
    if not request_id.isprintable():
        raise NotFound("request: its id has characters that no id has.")
    await state.lifecycle.ledger.flush()
    found = await asyncio.to_thread(look)
    patience = OTHER_WORKERS_TRIES if state.shared else 0
    while found is None and patience:  # another worker may have served it, and be about to write it
        patience -= 1
        await asyncio.sleep(BATCH_WAIT_S)
        found = await asyncio.to_thread(look)
    if found is None:
        raise NotFound(f"request: {request_id[:60]!r} is not in the ledger.")
    return found


class Feedback(BaseModel):
    """What the caller thinks of an answer: exactly one of `accept`, `reject` and `score`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    accept: bool | None = None
    reject: bool | None = None
    score: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    comment: str | None = Field(default=None, max_length=2000)
    source: str = Field(default=outcomes.CALLER, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$", max_length=64)
    """Who says so, where several do: each one's last word counts."""

    def value(self) -> float:
        """From 0, rejected, to 1, accepted. Raises InvalidRequest."""
        given = {"accept": self.accept, "reject": self.reject, "score": self.score}
        said = {name: value for name, value in given.items() if value is not None}
        if len(said) != 1:
            raise InvalidRequest(
                f'body: {len(said)} of accept, reject and score; give exactly one, such as {{"accept": true}}.'
            )
        if self.source == outcomes.JUDGE:
            raise InvalidRequest(
                f"source: {outcomes.JUDGE!r} is the gateway's own; choose another name.", param="source"
            )
        if self.comment is not None and "\x00" in self.comment:  # PostgreSQL has none in text
            raise InvalidRequest("comment: holds a NUL, which no database keeps; leave it out.", param="comment")
        return float(said["accept"] if "accept" in said else not said["reject"] if "reject" in said else said["score"])


@router.post(
    "/leadline/v1/requests/{request_id}/feedback",
    tags=["receipts"],
    operation_id="feedback",
    response_model=answers.Outcome,
    responses=refusals(403, 404, 409, 413, 415),
)
async def feedback(body: Feedback, request_id: str, principal: Caller, state: TheState) -> dict[str, Any]:
    """Say what an answer was worth. Said again by the same `source`, the last word counts."""
    principal.must_run()
    score, engine, tenant = body.value(), state.lifecycle.ledger.engine, _scope(principal)

    def say() -> outcomes.Row | None:
        return outcomes.caller_says(
            engine,
            request_id,
            score,
            tenant=tenant,
            source=body.source,
            comment=body.comment,
            now_ms=time.time_ns() // 1_000_000,
        )

    try:
        return _outcome(await _in_ledger(request_id, state, say))
    except outcomes.NothingServed as error:
        raise Conflict(f"request: no model answered {request_id[:60]}; there is nothing to judge.") from error
    except outcomes.TooManySources as error:
        most = outcomes.MAX_SOURCES
        raise Conflict(
            f"source: {most} sources speak of this request already, the most that are kept; use one of their names.",
            param="source",
        ) from error


def _outcome(row: outcomes.Row) -> dict[str, Any]:
    return {name: row[name] for name in answers.Outcome.model_fields}


def _whole(decision: str) -> dict[str, Any]:
    """A decision of the ledger with all its fields; one that another version wrote, as it stands there."""
    kept: dict[str, Any] = msgspec.json.decode(decision)
    try:
        return to_dict(from_dict(kept))
    except ValueError:
        return kept


@router.get("/leadline/v1/spend", tags=["receipts"], response_model=answers.Spend, responses=refusals())
async def spend(
    principal: Caller,
    lifecycle: TheLifecycle,
    hours: Annotated[float, Query(ge=0, le=MAX_HOURS, allow_inf_nan=False)] = 720,
    scope: Annotated[str | None, Query(max_length=MAX_PATH, pattern=RUN_PATTERN)] = None,
) -> dict[str, Any]:
    """Totals of the caller's tenant (admins: of all) over the last `hours`; with `scope`, of that scope of its key."""
    await lifecycle.ledger.flush()
    since_ms = int(max(0.0, time.time() - hours * 3600) * 1000)
    engine, tenant = lifecycle.ledger.engine, _scope(principal)
    of_scope = (principal.key_id, scope) if scope is not None else None
    totals = await asyncio.to_thread(report.summary, engine, since_ms=since_ms, tenant=tenant, scope=of_scope)
    worth = await asyncio.to_thread(report.worth, engine, since_ms=since_ms, tenant=tenant, scope=of_scope)
    models = await asyncio.to_thread(report.by_model, engine, since_ms=since_ms, tenant=tenant, scope=of_scope)
    return {"since_ms": since_ms, "tenant": tenant, "scope": scope, **totals, **worth, "by_model": models}


@router.get("/leadline/v1/budgets", tags=["receipts"], response_model=answers.BudgetList, responses=refusals(503))
async def budgets(
    principal: Caller,
    lifecycle: TheLifecycle,
    scope: Annotated[str | None, Query(max_length=MAX_PATH, pattern=RUN_PATTERN)] = None,
) -> dict[str, Any]:
    """What bounds the caller's own key: its own, its team's and its tenant's budgets, and with `scope` that run's."""
    found = await budgets_of(lifecycle, [principal], scope)
    return {"data": [shown(budget) for budget in found]}


class ExplainRequest(BaseModel):
    """A chat completion as it would be sent, and tags beside those of the header. All other headers count as they would
    there."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = "auto"
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    tags: list[str] = []


@router.post(
    "/leadline/v1/explain",
    tags=["receipts"],
    response_model=answers.Explanation,
    responses=refusals(403, 404, 413, 415, 503),
)
async def explain(body: ExplainRequest, request: Request, principal: Caller, lifecycle: TheLifecycle) -> dict[str, Any]:
    """What would be decided for this request now, and why, and the most it could cost; nothing runs and nothing is
    spent on a model."""
    principal.must_run()
    chat = msgspec.json.encode(body.model_dump(exclude={"tags"}, exclude_none=True))
    sent = read_headers(request.scope["headers"])
    call = read_chat(chat, replace(sent, token="", tags=sent.tags | frozenset(body.tags)))
    # The chat would come with the layout that this body has, and its bytes are what bounds its prompt.
    call = replace(call, body_bytes=max(len(chat), len(await request.body())))
    query = query_of(call, principal, at_ms=time.time_ns() // 1_000_000)
    asked = lifecycle.world.policy, query
    decision = await lifecycle.explain(query, bytes(call.fields["messages"]))
    routes = route_facts(*asked)
    return {
        "decision": to_dict(decision, asked),
        "routes": [fact._asdict() for fact in routes],
        "lines": [*to_lines(decision, asked), *map(str, routes)],
    }


def _scope(principal: Principal) -> str | None:
    return None if principal.role == "admin" else principal.tenant


class Web(FastAPI):
    """Describes the data plane too, which it does not serve."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = completed(super().openapi())
        return self.openapi_schema


def build_web() -> FastAPI:
    web = Web(title="Leadline", version=__version__, docs_url=None, redoc_url=None)
    web.include_router(router)
    web.include_router(admin_router)
    web.state.change_rate = ChangeRate()
    tell_refusals(web)
    return web
