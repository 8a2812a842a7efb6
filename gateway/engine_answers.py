"""What the engine's failures are to whoever asks it over HTTP, and how long it works for somebody who has hung up."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request

from gateway.errors import (
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LeadlineError,
    Unavailable,
    UnknownModel,
    UpstreamTimeout,
)
from gateway.upstream.types import UpstreamError
from local_engine.errors import EngineFailure, EngineGone, EngineSilent

_T = TypeVar("_T")


class EngineAway(Unavailable):
    code = "engine_gone"


class EngineHangs(Unavailable):
    code = "engine_silent"


def gone(message: str) -> EngineAway:
    return EngineAway(message, retry_after_s=1)


def silent() -> EngineHangs:
    return EngineHangs(
        "The engine does not answer; retry shortly, and have it restarted if it stays silent.", retry_after_s=1
    )


def error_of(error: UpstreamError) -> LeadlineError:
    if error.cause == "context_length":
        return ContextLengthExceeded(error.message, param="messages")
    if error.cause == "refused":
        return InvalidRequest(error.message, param=str((error.error or {}).get("param") or "") or None)
    if error.cause == "engine_gone":
        return gone(f"The engine is gone: {error.message}; it is being started again.")
    if error.cause == "timeout":
        return UpstreamTimeout(error.message)
    return InternalError(error.message)


async def attempted(work: Awaitable[_T], explain: Callable[[UpstreamError], LeadlineError]) -> _T:
    """`work` of an upstream. Raises what `explain` makes of what it raises."""
    try:
        return await work
    except UpstreamError as error:
        raise explain(error) from error


async def answered(work: Awaitable[_T]) -> _T:
    """`work` of the engine's client. Raises LeadlineError for what it raises."""
    try:
        return await work
    except (EngineFailure, EngineGone) as error:
        raise failure_of(error) from error


def failure_of(error: EngineFailure | EngineGone) -> LeadlineError:
    if isinstance(error, EngineSilent):
        return silent()
    if isinstance(error, EngineGone):
        return gone(f"The engine is gone: {error}; it is being started again.")
    if error.code == "context_length_exceeded":
        return ContextLengthExceeded(error.message, param="messages")
    if error.code == "model_not_found":
        return UnknownModel(error.message, param="model")
    if error.code == "deadline":
        return UpstreamTimeout(error.message)
    if error.code == "invalid_request":
        message, param = error.message.removeprefix("taps."), error.param.removeprefix("taps.")  # the body, here
        return InvalidRequest(message, param=param)
    return InternalError(error.message)


def bytes_of(messages: list[dict[str, Any]]) -> bytes:
    """As JSON, whatever stands in it: what cannot be read of it, the engine refuses by its place."""
    return json.dumps(messages).encode()


async def until_gone(request: Request, work: Awaitable[_T]) -> _T:
    """`work`, cancelled when the caller hangs up: the engine stops computing for nobody within a step."""
    working = asyncio.ensure_future(work)
    hearing = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((working, hearing), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise InvalidRequest("The caller hung up.")
        return await working
    finally:
        working.cancel()
        hearing.cancel()
        await asyncio.gather(working, hearing, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
