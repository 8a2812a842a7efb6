"""What the tests' own providers share: a free port on loopback, and answers as server-sent events."""

import json
from abc import ABC, abstractmethod
from typing import Any, Self

from aiohttp import web


class Served(ABC):
    """An application that is served from `start` to `stop`; its handlers are cancelled when their callers leave."""

    url = ""
    _runner: web.AppRunner | None = None

    @abstractmethod
    def app(self) -> web.Application: ...

    async def start(self) -> Self:
        self._runner = web.AppRunner(self.app(), handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()


async def begin_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


def event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


async def events(request: web.Request, *chunks: dict[str, Any]) -> web.StreamResponse:
    """A stream of these chunks, and its end."""
    response = await begin_events(request)
    await response.write(b"".join(map(event, chunks)) + b"data: [DONE]\n\n")
    return response


async def as_asked(request: web.Request, body: dict[str, Any], whole: dict[str, Any]) -> web.StreamResponse:
    """A whole chat answer, in one piece of a stream where that was asked for."""
    if not body.get("stream"):
        return web.json_response(whole)
    frame = {name: value for name, value in whole.items() if name not in ("choices", "usage")}
    pieces = [
        {**{name: value for name, value in choice.items() if name != "message"}, "delta": choice["message"]}
        for choice in whole["choices"]
    ]
    return await events(request, {**frame, "choices": pieces}, {**frame, "choices": [], "usage": whole["usage"]})
