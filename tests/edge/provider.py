"""A provider of texts, conversations and vectors that keeps what it was sent, and counts its own tokens."""

import asyncio
import base64
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.serving import Served, begin_events, event

WORDS = ("one", "two", "three")


def count(value: Any) -> int:
    """Tokens of a prompt or of an input: words, or token ids."""
    if isinstance(value, str):
        return len(value.split())
    return sum(1 if isinstance(part, int) else count(part) for part in value)


def vectors(value: Any) -> int:
    if isinstance(value, str):
        return 1
    return 1 if isinstance(value[0], int) else len(value)


@dataclass
class Provider(Served):
    """`fail_next` is answered, once, instead of the next call: (status, body)."""

    paths: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[list[tuple[str, str]]] = field(default_factory=list)
    fail_next: tuple[int, dict[str, str], str] | None = None
    echo: int | str | None = None
    """Answer all calls with an error that quotes the whole request: a status, or `stream`, `whole`, `text`."""
    endless: bool = False
    """Streams never end by themselves."""
    open_streams: int = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        self.headers.append(list(request.headers.items()))
        raw = await request.read()
        self.bodies.append(raw)
        if self.echo is not None:
            return await self._quote(request, raw, self.echo)
        if self.fail_next is not None:
            (status, headers, text), self.fail_next = self.fail_next, None
            return web.Response(status=status, headers=headers, text=text)
        body = json.loads(raw)
        if request.path == "/v1/embeddings":
            return self._embed(body)
        if body.get("stream"):
            return await self._stream(request, body)
        return web.json_response(self._whole(request.path, body))

    async def _quote(self, request: web.Request, raw: bytes, how: int | str) -> web.StreamResponse:
        said = f"{request.headers.get('Authorization')} {raw.decode()} {dict(request.headers)}"
        error = {"error": {"message": said, "type": said[:900], "param": said[:900], "code": said[:900]}}
        if how == "stream":
            response = await begin_events(request)
            await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n')
            await response.write(event(error))
            return response
        if how == "text":
            return web.Response(text=said)
        return web.json_response(error, status=200 if how == "whole" else int(how))

    def _embed(self, body: dict[str, Any]) -> web.Response:
        size = body.get("dimensions", 3)
        data: list[dict[str, Any]] = []
        for index in range(vectors(body["input"])):
            vector: Any = [float(index + place) for place in range(size)]
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        tokens = count(body["input"])
        return web.json_response(
            {"object": "list", "data": data, "model": body["model"],
             "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        )  # fmt: skip

    def _usage(self, body: dict[str, Any]) -> dict[str, int]:
        if "prompt" in body:
            prompt, texts = count(body["prompt"]), vectors(body["prompt"])
        else:
            prompt, texts = sum(count(str(message.get("content"))) for message in body["messages"]), 1
        output = len(WORDS) * (body.get("n") or 1) * texts
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        text = " ".join(WORDS)
        usage = self._usage(body)
        if path == "/v1/completions":
            choices: list[dict[str, Any]] = [
                {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}
                for index in range(usage["completion_tokens"] // len(WORDS))
            ]
            kind = "text_completion"
        else:
            choices = [
                {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None,
                 "finish_reason": "stop"}
            ]  # fmt: skip
            kind = "chat.completion"
        return {"id": "x-1", "object": kind, "created": 1, "model": body["model"], "choices": choices, "usage": usage}

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await begin_events(request)
        text = request.path == "/v1/completions"
        frame = {"id": "x-1", "object": "text_completion" if text else "chat.completion.chunk", "created": 1,
                 "model": body["model"]}  # fmt: skip

        async def send(choice: dict[str, Any] | None, usage: dict[str, int] | None = None) -> None:
            choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
            await response.write(event({**frame, "choices": choices, "usage": usage}))

        self.open_streams += 1
        try:
            while self.endless:
                await send({"delta": {"content": "word " * 2000}, "finish_reason": None})
        finally:
            self.open_streams -= 1
        for place, word in enumerate(WORDS):
            piece = word if not place else f" {word}"
            await send(
                {"text": piece, "finish_reason": None} if text else {"delta": {"content": piece}, "finish_reason": None}
            )
            await asyncio.sleep(0)
        await send({"text": "", "finish_reason": "stop"} if text else {"delta": {}, "finish_reason": "stop"})
        if (body.get("stream_options") or {}).get("include_usage"):
            await send(None, self._usage(body))
        await response.write(b"data: [DONE]\n\n")
        return response
