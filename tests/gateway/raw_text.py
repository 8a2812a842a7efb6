"""vLLM's paths for raw text, before a chat endpoint: it tells the prompt of a conversation, and goes on from any text.

A conversation is one token, and its prompt is that token's number; what stands behind it is what has been written.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

from tests.serving import begin_events, event

OPENING = "assistant:\n"


class RawText:
    def __init__(self) -> None:
        self.conversations: list[Any] = []
        self.reads_special = True
        """A text that it made is read as the tokens that it was made of."""
        self.hold = asyncio.Event()
        self.hold.set()
        self.statuses: dict[str, int] = {}
        """What it answers, by model, who asks for a conversation's prompt."""

    def add_to(self, app: web.Application, measure: Callable[[dict[str, Any]], tuple[int, int]]) -> None:
        """`measure` says of a chat how long its prompt is, and how long it may be with its answer."""
        self._measure = measure
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/completions", self._complete)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "prompt" in body:
            count, most = self._measure({"messages": self._messages(body["prompt"])})
            again = [_parts(body["prompt"])[0]] if self.reads_special else []
            return web.json_response({"count": count, "max_model_len": most, "tokens": again})
        self.conversations.append(body["messages"])
        await self.hold.wait()
        if (status := self.statuses.get(body["model"])) is not None:
            return web.json_response({"error": {"message": "not now"}}, status=status)
        return web.json_response({"count": 1, "max_model_len": 1 << 20, "tokens": [len(self.conversations) - 1]})

    async def _detokenize(self, request: web.Request) -> web.Response:
        (token,) = (await request.json())["tokens"]
        return web.json_response({"prompt": f"[{token}]{OPENING}"})

    def _messages(self, prompt: str) -> list[Any]:
        conversation, begun = _parts(prompt)
        return [*self.conversations[conversation], {"role": "assistant", "content": begun}]

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        """As a chat whose last message goes on, whose thoughts stand between tags."""
        body = await request.json()
        assert body.pop("add_special_tokens") is False
        assert body["max_tokens"] is not None, "it would stop at 16"
        chat = {**body, "messages": self._messages(body.pop("prompt")), "raw": True}
        if "logprobs" in body:
            chat |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        url = request.url.with_path("/v1/chat/completions")
        try:
            async with aiohttp.ClientSession() as session, session.post(url, json=chat) as answer:
                if answer.status != 200:
                    return web.Response(status=answer.status, body=await answer.read())
                response = await begin_events(request)
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        await response.write(event(_as_text(json.loads(line[6:]))))
                    elif line.startswith(b"data: "):
                        await response.write(line + b"\n")
                return response
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()


def _parts(prompt: str) -> tuple[int, str]:
    found = re.fullmatch(rf"\[(\d+)\]{OPENING}(.*)", prompt, re.DOTALL)
    assert found is not None
    return int(found[1]), found[2]


def _as_text(chunk: dict[str, Any]) -> dict[str, Any]:
    pieces = []
    for choice in chunk["choices"]:
        delta = choice.pop("delta")
        piece = {**choice, "text": (delta.get("reasoning_content") or "") + (delta.get("content") or "")}
        if listed := (choice.get("logprobs") or {}).get("content"):
            piece["logprobs"] = {
                "tokens": [one["token"] for one in listed],
                "token_logprobs": [one["logprob"] for one in listed],
                "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in listed],
            }
        pieces.append(piece)
    return {**chunk, "object": "text_completion", "choices": pieces}
