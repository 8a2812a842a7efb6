"""`/prefix/…` of an engine that listens: what it keeps of prompts, for whoever routes by it or wants it kept.

    POST /prefix/lookup   how many tokens of a prompt are there      POST /prefix/evict   forget a conversation, or all
    POST /prefix/pin      keep a conversation's beginning            GET  /prefix/stats   what every model's store did
    POST /prefix/unpin    no more                                    GET  /prefix/events  what comes and goes, as SSE

All but the last two are of one tenant, `cache_salt`. The events have vLLM's names and fields, in JSON: a stream begins
with all that is there, so a router that connects again knows what to forget.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from gateway.engine_answers import answered, bytes_of, failure_of, until_gone
from gateway.engine_names import ModelNames
from gateway.upstream.sse import write_event
from local_engine.client import EngineClient
from local_engine.errors import EngineFailure, EngineGone
from local_engine.prefix_types import BlockStored, KVEvent
from local_engine.types import Effort

PIN_TIMEOUT_S = 600.0
"""For what is not stored yet to be read."""
Action = Literal["lookup", "pin", "unpin", "evict"]
_json = msgspec.json.Encoder().encode


class PrefixRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: Effort = "low"
    """Of a lookup: as the request would have it."""
    cache_salt: str | None = None


class EvictRequest(PrefixRequest):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None  # type: ignore[assignment] # wider
    """None: all that the tenant has, in every tier."""


def add_prefix_routes(app: FastAPI, client: Callable[[], EngineClient], names: ModelNames) -> None:
    """`client` raises what is to be answered while there is no engine."""

    async def act(action: Action, asked: PrefixRequest, request: Request) -> dict[str, Any]:
        work = client().prefix(
            names.find(asked.model).name,
            action,
            bytes_of(asked.messages) if asked.messages is not None else None,
            bytes_of(asked.tools) if asked.tools is not None else None,
            effort=asked.reasoning_effort,
            salt=asked.cache_salt or "",
            deadline_s=PIN_TIMEOUT_S,
        )
        result = await answered(until_gone(request, work))
        return {"model": asked.model, "tokens": result.tokens, "prompt_tokens": result.prompt_tokens}

    @app.post("/prefix/lookup")
    async def lookup(asked: PrefixRequest, request: Request) -> dict[str, Any]:
        """How many tokens of this prompt a request would find now; nothing is counted as used."""
        return await act("lookup", asked, request)

    @app.post("/prefix/pin")
    async def pin(asked: PrefixRequest, request: Request) -> dict[str, Any]:
        """Keep what these messages begin from eviction; what is not stored of it is read first."""
        return await act("pin", asked, request)

    @app.post("/prefix/unpin")
    async def unpin(asked: PrefixRequest, request: Request) -> dict[str, Any]:
        """Undo a pin of the same messages."""
        return await act("unpin", asked, request)

    @app.post("/prefix/evict")
    async def evict(asked: EvictRequest, request: Request) -> dict[str, Any]:
        """Forget these messages and all that continues them; without messages, all that the tenant has."""
        return await act("evict", asked, request)

    @app.get("/prefix/stats")
    async def stats() -> dict[str, Any]:
        """By model."""
        found = await answered(client().prefix_stats())
        return {"models": msgspec.to_builtins(found)}

    @app.get("/prefix/events")
    async def events(model: str) -> StreamingResponse:
        """Server-sent events until the caller leaves."""
        told = _told(client(), names.find(model).name)
        return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _told(client: EngineClient, model: str) -> AsyncIterator[bytes]:
    yield b": stored prefixes\n\n"
    try:
        async with aclosing(client.prefix_events(model)) as groups:
            async for group in groups:
                yield b"".join(write_event(_json(in_json(event))) for event in group)
    except (EngineFailure, EngineGone) as error:
        yield write_event(_json(failure_of(error).body()))


def in_json(event: KVEvent) -> dict[str, Any]:
    """An event as an object; the names of blocks are hexadecimal."""
    told = {field: getattr(event, field) for field in event.__struct_fields__}
    told["block_hashes"] = [name.hex() for name in event.block_hashes]
    if isinstance(event, BlockStored):
        told["parent_block_hash"] = event.parent_block_hash.hex() if event.parent_block_hash is not None else None
    return {"type": type(event).__name__, **told}
