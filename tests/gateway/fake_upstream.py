"""An OpenAI-compatible upstream that plays faults on command and keeps its own books.

It counts its own tokens (words) and its own money (Decimal dollars) in code of its own; `truth` is what it would bill.
A test joins truth, ledger and client transcript: a row without its partner on any side is a failure.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from aiohttp import web

from tests.serving import Served, begin_events, event

PRICES = {
    "cheap": (Decimal("0.15"), Decimal("0.075"), Decimal("0.60")),
    "other": (Decimal("0.30"), Decimal("0.15"), Decimal("1.20")),
    "third": (Decimal("0.60"), Decimal("0.30"), Decimal("2.40")),
    "dear": (Decimal("2.5"), Decimal("1.25"), Decimal("10")),
}
"""Dollars per million tokens: input, cached input, output. The gateway's policy in these tests says the same."""

TWO_MODELS = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 30s, retries: 0, breaker: off}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}},
          thinking: {{field: reasoning_effort, off: minimal}}}}
  dear: {{provider: fake, model: dear, context: 128000, max_output: 4000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, output: $10/Mtok}},
         thinking: {{field: thinking_budget, high_tokens: 3000}}}}
"""
"""How policies begin that have a cheap model and a dear one; more models, and routes, follow."""

Fault = Callable[["FakeUpstream", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class Bill:
    model: str
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    nanousd: int


@dataclass
class FakeUpstream(Served):
    """`faults` is consumed from the front, one per call; an empty list means: answer properly."""

    faults: list[Fault | None] = field(default_factory=list)
    truth: list[Bill] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    closed_early: int = 0
    words: int = 12
    pace_s: float = 0.0
    open_streams: int = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.bodies.append(raw)
        self.requests.append(dict(request.headers))
        body = json.loads(raw)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            return await fault(self, request, body)
        return await (self.stream(request, body) if body.get("stream") else self.plain(body))

    def bill(self, body: dict[str, Any], completion: int) -> dict[str, Any]:
        prompt = sum(len(str(message.get("content")).split()) + 3 for message in body["messages"])
        cached = prompt // 3
        input_price, cached_price, output_price = PRICES[body["model"]]
        dollars = ((prompt - cached) * input_price + cached * cached_price + completion * output_price) / Decimal(10**6)
        nanousd = int((dollars * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_UP))
        self.truth.append(Bill(body["model"], bool(body.get("stream")), prompt, cached, completion, nanousd))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def plain(self, body: dict[str, Any]) -> web.Response:
        n = body.get("n") or 1
        text = " ".join(f"w{i}" for i in range(self.words))
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
            for i in range(n)
        ]
        return web.json_response(
            {
                "id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": choices, "usage": self.bill(body, self.words * n), "vendor_field": {"kept": True},
            }
        )  # fmt: skip

    async def stream(
        self, request: web.Request, body: dict[str, Any], *, cut_after: int | None = None, done: bool = True
    ) -> web.StreamResponse:
        response = await begin_events(request)
        self.open_streams += 1
        n = body.get("n") or 1
        frame = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        sent = 0

        async def send(**fields: Any) -> None:
            await response.write(event({**frame, **fields}))

        try:
            for word in range(self.words):
                for index in range(n):
                    delta = {"content": f"w{word}" if word == 0 else f" w{word}"}
                    if word == 0:
                        delta["role"] = "assistant"
                    await send(choices=[{"index": index, "delta": delta, "finish_reason": None}])
                    sent += 1
                if cut_after is not None and word + 1 >= cut_after:
                    assert request.transport is not None
                    request.transport.close()
                    return response
                if self.pace_s:
                    await asyncio.sleep(self.pace_s)
            for index in range(n):
                await send(choices=[{"index": index, "delta": {}, "finish_reason": "stop"}] if done else [])
            usage = self.bill(body, self.words * n)
            if (body.get("stream_options") or {}).get("include_usage"):
                await send(choices=[], usage=usage)
            if done:
                await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.closed_early += 1
            self.bill(body, sent)
            raise
        finally:
            self.open_streams -= 1
        return response


def status(code: int, headers: dict[str, str] | None = None, text: str | None = None) -> Fault:
    """Answer with this status and an error body (or with `text`)."""

    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if text is not None:
            return web.Response(status=code, text=text, headers=headers)
        error = {"message": f"fault {code}", "type": "fault", "param": None, "code": f"f{code}"}
        return web.json_response({"error": error}, status=code, headers=headers)

    return play


async def invalid_json(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(text="{not json", content_type="application/json")


async def cut_answer(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices":')
    assert request.transport is not None
    request.transport.close()
    return response


async def silence(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


async def reset(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_stream(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await upstream.stream(request, body, cut_after=3)


async def unfinished_stream(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await upstream.stream(request, body, done=False)


async def error_in_stream(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await begin_events(request)
    await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n')
    await asyncio.sleep(0.05)
    await response.write(b'data: {"error":{"message":"overloaded"}}\n\n')
    return response


async def empty_stream(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await begin_events(request)
