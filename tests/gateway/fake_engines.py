"""vLLM, SGLang and llama.cpp as their documents describe them: prefix caches, loads, salts, aborts by disconnect.

Each remembers the prompts it has read, block by block, within one `cache_salt`, and reports what it had of a prompt in
its own way. Nothing of the gateway's is used here.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

BLOCK = 16
"""Characters of a block, and a token each."""


class FakeEngine:
    """One server of a kind; `waiting` and `running` are what it says of its load beside the calls it runs now."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.waiting = 0
        self.running = 0
        self.kv = 0.1
        """Share that running requests hold. llama.cpp does not tell it."""
        self.starting = False
        """It listens, and its engine is not there: 503, at once."""
        self.loads_asked = 0
        self.tells_load = asyncio.Event()
        self.tells_load.set()
        self.aborted = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()
        self.priority_scheduling = False
        """vLLM's `--scheduling-policy priority`."""
        self._blocks: set[str] = set()

    def prompt_of(self, body: dict[str, Any]) -> str:
        return json.dumps([body.get("tools"), body["messages"]])

    def _had(self, body: dict[str, Any]) -> tuple[int, int]:
        """(tokens of the prompt, those of them that it had); all are remembered."""
        text = self.prompt_of(body)
        salt = body.get("cache_salt", "") if self.kind != "llamacpp" else ""
        cached, still = 0, True
        for end in range(BLOCK, len(text) + 1, BLOCK):
            key = f"{salt}|{text[:end]}"
            still = still and key in self._blocks
            cached += BLOCK * still
            self._blocks.add(key)
        return len(text), cached

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.starting:
            return web.json_response(
                {"error": {"message": "There is no engine."}}, status=503, headers={"Retry-After": "1"}
            )
        if self.kind == "vllm" and body.get("priority") and not self.priority_scheduling:
            said = f"Got priority {body['priority']} but Priority scheduling is not enabled."
            return web.json_response({"error": {"message": said, "code": 400}}, status=400)
        tokens, cached = self._had(body)
        usage: dict[str, Any] = {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3}
        beside: dict[str, Any] = {}
        if self.kind == "llamacpp":
            beside = {"timings": {"cache_n": cached, "prompt_n": tokens - cached, "predicted_n": 3}}
        else:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        headers = {}
        if self.kind == "vllm" and request.headers.get("endpoint-load-metrics-format") == "JSON":
            told = {"named_metrics": {"num_requests_waiting": self.waiting, "kv_cache_usage_perc": self.kv}}
            headers["endpoint-load-metrics"] = f"JSON {json.dumps(told)}"
        self.running += 1
        try:
            if body.get("stream"):
                return await self._stream(request, {"usage": usage, **beside}, headers)
            await self.hold.wait()
            message = {"role": "assistant", "content": "one two three"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [choice],
                    "usage": usage,
                    **beside,
                },
                headers=headers,
            )
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, end: dict[str, Any], headers: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
        await response.prepare(request)
        frame = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        for word in ("one", " two", " three"):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            await response.write(b"data: " + json.dumps({**frame, "choices": [choice]}).encode() + b"\n\n")
            await self.hold.wait()
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await response.write(b"data: " + json.dumps({**frame, "choices": [last]}).encode() + b"\n\n")
        await response.write(b"data: " + json.dumps({**frame, "choices": [], **end}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def loads(self, request: web.Request) -> web.Response:
        self.loads_asked += 1
        await self.tells_load.wait()
        counts = {"num_running_reqs": self.running, "num_waiting_reqs": self.waiting}
        rank = {"dp_rank": 0, **counts, "token_usage": self.kv}
        return web.json_response({"timestamp": "now", "version": "0", "loads": [rank]})

    async def slots(self, request: web.Request) -> web.Response:
        self.loads_asked += 1
        await self.tells_load.wait()
        busy = self.running + self.waiting
        return web.json_response([{"id": n, "n_ctx": 4096, "is_processing": n < busy} for n in range(8)])


@asynccontextmanager
async def engine(kind: str) -> AsyncIterator[FakeEngine]:
    fake = FakeEngine(kind)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.chat)
    if kind == "sglang":
        app.router.add_get("/v1/loads", fake.loads)
    if kind == "llamacpp":
        app.router.add_get("/slots", fake.slots)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield fake
    finally:
        fake.hold.set()
        with suppress(asyncio.CancelledError):
            await runner.cleanup()
