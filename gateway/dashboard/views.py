"""The dashboard's pages: sign in, overview, requests, one request. Read-only but for the session cookie.

Every page reads what was written before it (`ledger.flush`) and asks the ledger in a thread.
"""

import asyncio
import time
from typing import Annotated
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from gateway.admission.keys import Principal
from gateway.dashboard import pages, queries, session
from gateway.dashboard.export import csv_lines
from gateway.dashboard.filters import Filters
from gateway.edge.caller import state_of
from gateway.errors import Unauthenticated
from gateway.ledger.browse import Slice
from gateway.lifecycle import Lifecycle

HOME = "/dashboard"
LOGIN = "/dashboard/login"
MAX_FORM_BYTES = 4096

router = APIRouter(prefix=HOME, include_in_schema=False)


class SignInNeeded(Exception):
    """Nobody is signed in; `url` is where they wanted to go."""

    def __init__(self, url: str) -> None:
        self.url = url


def mount_dashboard(web: FastAPI) -> None:
    """Add the dashboard's pages to the application."""
    web.include_router(router)
    web.add_exception_handler(SignInNeeded, _to_login)


def viewer(request: Request) -> Principal:
    """Whose eyes these are. Raises SignInNeeded."""
    found = session.read(
        request.cookies.get(session.COOKIE),
        state_of(request).lifecycle.keys,
        state_of(request).pepper,
        now_s=int(time.time()),
    )
    if found is None:
        raise SignInNeeded(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
    return found


async def settled(request: Request) -> Lifecycle:
    """The lifecycle, once all that it has closed can be read from SQL."""
    lifecycle = state_of(request).lifecycle
    await lifecycle.ledger.flush()
    return lifecycle


def filters_of(request: Request) -> Filters:
    return Filters.read(request.query_params)


Viewer = Annotated[Principal, Depends(viewer)]
Settled = Annotated[Lifecycle, Depends(settled)]
TheFilters = Annotated[Filters, Depends(filters_of)]


@router.get("")
async def overview(request: Request, viewer: Viewer, lifecycle: Settled, filters: TheFilters) -> Response:
    now = time.time()
    chosen = Filters(range=filters.range)
    data = await asyncio.to_thread(
        queries.overview, lifecycle.ledger.engine, chosen.slice(viewer, now_s=now), now_ms=int(now * 1000)
    )
    state = state_of(request)
    return pages.html(
        "overview.html",
        viewer=viewer,
        filters=chosen,
        data=data,
        policy=lifecycle.world.policy,
        refused=state.reloader.refused if state.reloader is not None else None,
        drifted=[one for one in state.learned.calibrations() if one.alarm],
    )


@router.get("/requests")
async def requests(viewer: Viewer, lifecycle: Settled, filters: TheFilters) -> Response:
    now = time.time()
    data = await asyncio.to_thread(
        queries.listing,
        lifecycle.ledger.engine,
        filters.slice(viewer, now_s=now),
        everything=Filters(range=filters.range).slice(viewer, now_s=now),
        before=filters.cursor(),
    )
    return pages.html("requests.html", viewer=viewer, filters=filters, data=data)


@router.get("/requests.csv")
async def requests_csv(viewer: Viewer, lifecycle: Settled, filters: TheFilters) -> Response:
    wanted: Slice = filters.slice(viewer, now_s=time.time())
    headers = {**pages.PRIVATE, "content-disposition": 'attachment; filename="leadline-requests.csv"'}
    return StreamingResponse(csv_lines(lifecycle.ledger.engine, wanted), headers=headers, media_type="text/csv")


@router.get("/requests/{request_id}")
async def one_request(request_id: str, viewer: Viewer, lifecycle: Settled) -> Response:
    tenant = None if viewer.role == "admin" else viewer.tenant
    data = None
    if request_id.isprintable():  # PostgreSQL does not even look for text with a zero in it
        data = await asyncio.to_thread(queries.one_request, lifecycle.ledger.engine, request_id, tenant=tenant)
    if data is None:
        return pages.html("missing.html", 404, viewer=viewer, request_id=request_id)
    return pages.html("request.html", viewer=viewer, data=data)


@router.get("/login")
async def login_page(next: str = HOME) -> Response:
    return pages.html("login.html", next=_own_page(next), problem="")


@router.post("/login")
async def login(request: Request) -> Response:
    form = await _form(request)
    target = _own_page(form.get("next", HOME))
    if _from_elsewhere(request):
        return pages.html("login.html", 403, next=target, problem="That form came from another site. Sign in here.")
    try:
        principal = state_of(request).lifecycle.keys.authenticate(form.get("key", "").strip())
    except Unauthenticated:
        problem = "That is not one of this gateway's keys, or it was revoked."
        return pages.html("login.html", 401, next=target, problem=problem)
    answer = RedirectResponse(target, 303, headers=pages.PRIVATE)
    answer.set_cookie(
        session.COOKIE,
        session.sign(principal, state_of(request).pepper, now_s=int(time.time())),
        max_age=session.LIFETIME_S,
        path=HOME,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
async def logout(request: Request) -> Response:
    if _from_elsewhere(request):
        return RedirectResponse(HOME, 303, headers=pages.PRIVATE)
    answer = RedirectResponse(LOGIN, 303, headers=pages.PRIVATE)
    answer.delete_cookie(session.COOKIE, path=HOME, httponly=True, samesite="strict")
    return answer


@router.get("/static/{name}")
async def asset(name: str) -> Response:
    return pages.asset(name) or Response(status_code=404, headers=pages.SECURITY_HEADERS)


async def _to_login(request: Request, error: Exception) -> Response:
    assert isinstance(error, SignInNeeded)
    query = "" if error.url == HOME else "?" + urlencode({"next": error.url})
    return RedirectResponse(LOGIN + query, 303, headers=pages.PRIVATE)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small form; one that is too large has none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            return {}
    return {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _own_page(url: str) -> str:
    """`url` if it is a page of the dashboard, else its first page: nobody is sent elsewhere from here."""
    path = url.partition("?")[0]
    return url if url.isprintable() and (path == HOME or path.startswith(f"{HOME}/")) else HOME


def _from_elsewhere(request: Request) -> bool:
    """Browsers say who made them post; without this, another site could sign its visitors in, or out."""
    return request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
