"""Refusals of the parts that a web framework serves, its own included, in the shape of all other errors."""

from collections.abc import Callable, Coroutine, Iterable
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route

from gateway.edge.asgi import error_headers
from gateway.edge.surrogates import half_character_in
from gateway.errors import InternalError, InvalidRequest, LeadlineError, MethodNotAllowed, NotFound
from gateway.telemetry.logs import strike


class TextRoute(APIRoute):
    """Refuses half a character wherever it stands in a body: whoever reads it further in could not write it down."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            if half := half_character_in(await request.body()):
                raise half
            return await handle(request)

        return read


def refusal(error: LeadlineError) -> Response:
    response = JSONResponse(error.body(), status_code=error.http_status)
    response.raw_headers += error_headers(error)
    return response


def tell_refusals(web: FastAPI) -> None:
    """Every error of `web` is told as ours from here on."""
    web.add_exception_handler(LeadlineError, _error)
    web.add_exception_handler(HTTPException, _http_error)
    web.add_exception_handler(RequestValidationError, _invalid)
    web.add_exception_handler(Exception, _fault)


def methods_of(routes: Iterable[BaseRoute], path: str) -> set[str]:
    """The methods that some route takes at `path`."""
    found: set[str] = set()
    for route in routes:
        inner = getattr(route, "original_router", None)  # FastAPI keeps the routers that it includes
        if inner is not None:
            found |= methods_of(inner.routes, path)
        elif isinstance(route, Route | APIRoute) and route.path_regex.match(path):
            found |= route.methods or set()
    return found


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LeadlineError)
    return refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, LeadlineError):  # raised while the body was read
        return refusal(error.__cause__)
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        paths: list[str] = [*request.app.openapi()["paths"]]
        close = get_close_matches(request.url.path[:200], paths, n=1, cutoff=0.8)
        meant = f"did you mean {close[0]}? " if close else ""
        return refusal(NotFound(f"{where}: no such path; {meant}/openapi.json lists them."))
    if error.status_code == 405:
        allowed = methods_of(request.app.routes, request.url.path)
        return refusal(
            MethodNotAllowed(f"{where}: this path takes {' or '.join(sorted(allowed))} alone.", allowed=allowed)
        )
    return refusal(InvalidRequest(f"{where}: {error.detail}."))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"][1:])
    if not path and isinstance(error.body, bytes):  # it was not decoded
        sent = request.headers.get("content-type")
        said = f"`{sent[:80]}`" if sent else "missing"
        fix = "so the body is not read as JSON; send the header `Content-Type: application/json`"
        return refusal(InvalidRequest(f"Content-Type: {said}, {fix}."))
    if first["type"] == "json_invalid":
        what, at = first["ctx"]["error"], first["loc"][-1]
        return refusal(InvalidRequest(f"body: not valid JSON at character {at}: {what}; send a JSON object."))
    if not path:
        return refusal(InvalidRequest(f"body: {first['msg']}; send a JSON object."))
    if first["type"] == "extra_forbidden":
        close = get_close_matches(str(first["loc"][-1]), _fields_of(request), n=1)
        meant = f"did you mean `{close[0]}`?" if close else "leave it out."
        return refusal(InvalidRequest(f"{path}: unknown field; {meant}", param=path))
    return refusal(InvalidRequest(f"{path}: {first['msg']}{_got(first['input'])}.", param=path))


def _fields_of(request: Request) -> list[str]:
    """Of the body that this path takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    return [*getattr(body.field_info.annotation, "model_fields", ())] if body is not None else []


def _got(value: object) -> str:
    """A value that is short enough to be told."""
    if value is None or not isinstance(value, str | int | float):
        return ""
    told = strike(repr(value))
    return f", got {told}" if len(told) <= 42 else ""


async def _fault(request: Request, error: Exception) -> Response:
    """Starlette raises it again once it is told, for the log."""
    return refusal(InternalError("The server failed at this request; it is in its log."))
