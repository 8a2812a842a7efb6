"""A provider of two models that think in steps, with a prefix cache, and books of its own.

It goes on from a thought that is sent back to it, in any of the ways that servers know (vLLM's, DeepSeek's, or a last
message alone), stops where it is told to, and rates a step. Tokens are words; what it bills is `truth`. Nothing of the
gateway's is used here.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from aiohttp import web

from tests.gateway.raw_text import RawText
from tests.serving import Served, as_asked, begin_events, event

PRICES = {
    "base": (Decimal("2.5"), Decimal("0.25"), Decimal("10")),
    "draft": (Decimal("0.15"), Decimal("0.015"), Decimal("0.60")),
}
"""Dollars per million tokens: input, cached input, output. The policies of the tests say the same."""
STEPS = [f"Step {n} of the proof follows from what was said before it." for n in range(1, 7)]
ANSWER = "The answer is forty two."
BAD = "This is WRONG and should not stand in any proof at all."
BLOCK = 4
_WORD = re.compile(r"\n\n|\s?[^\s]+|\s")
Hook = Callable[["Reasoner", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


@dataclass
class Mind:
    """What one model thinks: by step, by what it is told to have got wrong, and how it says it."""

    steps: list[str] = field(default_factory=lambda: list(STEPS))
    answer: str = ANSWER
    unsure: frozenset[int] = frozenset()
    """Steps, from 0, whose first word it is in doubt about."""
    separates: bool = True
    """Thoughts come in `reasoning_content`; else between tags."""
    tags: bool = True
    """Else it answers at once, without a thought."""
    closes: bool = True
    """It ends its thought; else it stops in the middle of it."""


@dataclass(frozen=True)
class Bill:
    model: str
    prompt: int
    cached: int
    completion: int
    nanousd: int


@dataclass
class Reasoner(Served):
    minds: dict[str, Mind]
    hooks: dict[str, list[Hook | None]] = field(default_factory=dict)
    """By model, consumed from the front, one per call; an empty list: answer properly."""
    truth: list[Bill] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    pace_s: float = 0.0
    together: int = 1
    """Words in one piece of a stream, as of a server that guesses tokens."""
    left: int = 0
    raw: RawText | None = field(default_factory=RawText)
    """It serves vLLM's paths for raw text, too."""
    context: int = 1 << 20
    """Tokens, of each of them. It refuses to be asked for more than fits, as vLLM does."""
    _cached: set[tuple[str, ...]] = field(default_factory=set)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        if self.raw is not None:
            self.raw.add_to(app, lambda chat: (len(_words(_prompt(chat))), self.context))
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        waiting = self.hooks.get(body["model"]) or []
        hook = waiting.pop(0) if waiting else None
        if hook is not None and (played := await hook(self, request, body)) is not None:
            return played
        words, reason, stopped, doubts = self.words(body)
        room = self.context - len(_words(_prompt(body)))
        if room < (_most(body) or 1):
            error = {"message": f"maximum context length is {self.context} tokens", "code": "context_length_exceeded"}
            return web.json_response({"error": error}, status=400)
        if len(words) > room:
            words, reason = words[:room], "length"
        if body.get("stream"):
            return await self.stream(request, body, words, reason, stopped, doubts)
        await asyncio.sleep(self.pace_s)
        usage = self.bill(body, len(words))
        thought, content = _split("".join(words), self.thinking(body), self.separates(body))
        message = {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason, "stop_reason": stopped}
        if body.get("logprobs"):
            top = body["top_logprobs"]
            choice["logprobs"] = {"content": [_listed(word, top, at in doubts) for at, word in enumerate(words)]}
        return web.json_response(
            {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice],
             "usage": usage}
        )  # fmt: skip

    async def stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        words: list[str],
        reason: str | None,
        stopped: str | None = None,
        doubts: Collection[int] = (),
    ) -> web.StreamResponse:
        """`reason` None: it dies there."""
        response = await begin_events(request)
        frame = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        async def send(**fields: Any) -> None:
            await response.write(event({**frame, **fields}))

        sent, said, told = 0, "", ("", "")
        thinking, separates = self.thinking(body), self.separates(body)
        try:
            for at in range(0, len(words), self.together):
                some = words[at : at + self.together]
                said += "".join(some)
                split = _split(said, thinking, separates)
                thought, content = split[0][len(told[0]) :], split[1][len(told[1]) :]
                told = split
                delta = {
                    **({"reasoning_content": thought} if thought else {}),
                    **({"content": content} if content else {}),
                }
                piece: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
                if body.get("logprobs"):
                    listed = [_listed(word, body["top_logprobs"], at + n in doubts) for n, word in enumerate(some)]
                    piece["logprobs"] = {"content": listed}
                sent += len(some)
                await send(choices=[piece])
                await asyncio.sleep(self.pace_s)
            if reason is None:
                self.bill(body, sent)
                assert request.transport is not None
                request.transport.close()
                return response
            await send(choices=[{"index": 0, "delta": {}, "finish_reason": reason, "stop_reason": stopped}])
            await send(choices=[], usage=self.bill(body, len(words)))
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            self.bill(body, sent)
            raise
        return response

    def bill(self, body: dict[str, Any], completion: int) -> dict[str, Any]:
        model, prompt = body["model"], _words(_prompt(body))
        ends = range(BLOCK, len(prompt) + 1, BLOCK)
        cached = 0
        for end in ends:
            if (model, *prompt[:end]) not in self._cached:
                break
            cached = end
        self._cached.update((model, *prompt[:end]) for end in ends)
        rates = PRICES[model]
        dollars = ((len(prompt) - cached) * rates[0] + cached * rates[1] + completion * rates[2]) / Decimal(10**6)
        nanousd = int((dollars * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_UP))
        self.truth.append(Bill(model, len(prompt), cached, completion, nanousd))
        return {
            "prompt_tokens": len(prompt), "completion_tokens": completion, "total_tokens": len(prompt) + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def thinking(self, body: dict[str, Any]) -> bool:
        begun = _begun(body)
        return begun is None or (begun.startswith("<think>") and "</think>" not in begun)

    def separates(self, body: dict[str, Any]) -> bool:
        return self.minds[body["model"]].separates and not body.get("raw")

    def words(self, body: dict[str, Any]) -> tuple[list[str], str, str | None, set[int]]:
        """(what it says, why it stops, at which stop string, which of the words it was in doubt about)."""
        mind, begun, doubts = self.minds[body["model"]], _begun(body), set()
        if begun is not None and begun.endswith("Rate this step 0-9:"):
            last = begun.removesuffix("Rate this step 0-9:").rstrip("\n").rsplit("\n\n", 1)[-1]
            text = "2" if "WRONG" in last else "9"
        elif begun is not None and not self.thinking(body):
            text = mind.answer.removeprefix(begun.rpartition("</think>")[2].lstrip())
        else:
            thought = (begun or "").removeprefix("<think>\n")
            done, part = thought.count("\n\n"), thought.rsplit("\n\n", 1)[-1]
            left = mind.steps[done:]
            if left and part and not left[0].startswith(part):
                left[0] = f"{part} and so on."
            text = "\n\n".join(left)[len(part) :]
            doubts = {0} if done in mind.unsure and not part else set()
            if mind.closes:
                text += ("\n\n" if left else "") + "</think>\n\n" + mind.answer
            if not mind.tags:
                text = mind.answer
            elif begun is None and not mind.separates:
                text = f"<think>\n{text}"
        found = [(at, stop) for stop in body.get("stop") or () if (at := text.find(stop)) >= 0]
        at, stopped = min(found, default=(len(text), None))
        words = _words(text[:at])
        most = _most(body)
        if most is not None and len(words) > most:
            return words[:most], "length", None, doubts
        return words, "stop", stopped, doubts


def _most(body: dict[str, Any]) -> int | None:
    most: int | None = body.get("max_tokens") or body.get("max_completion_tokens")
    return most


def _split(text: str, thinking: bool, separates: bool) -> tuple[str, str]:
    if not separates or not thinking:
        return "", text
    thought, tag, content = text.removeprefix("<think>\n").partition("</think>")
    return thought, content.lstrip("\n") if tag else ""


def _begun(body: dict[str, Any]) -> str | None:
    """The answer that has begun; None: there is none."""
    last = body["messages"][-1]
    if last["role"] != "assistant":
        return None
    if "reasoning_content" in last:
        over = last["content"] or body.get("continue_final_message") == "content"
        closing = "\n</think>\n\n" if over else ""
        return f"<think>\n{last['reasoning_content']}{closing}{last['content'].strip()}"
    text: str = last["content"]
    return text


def _prompt(body: dict[str, Any]) -> str:
    said = [str(message["content"]) for message in body["messages"] if message["role"] != "assistant"]
    return " ".join(said) + " \n" + (_begun(body) or "")


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _listed(word: str, top: int, doubtful: bool) -> dict[str, Any]:
    """Two likely words, or one."""
    p = 0.5 if doubtful else 0.998
    likely = [(word, p), ("else" if word != "9" else "8", 1 - p)]
    if doubtful:
        likely = [(word, 1 / top), *((f"other{n}", 1 / top) for n in range(1, top))]
    listed = [{"token": text, "logprob": math.log(share), "bytes": None} for text, share in likely]
    return {"token": word, "logprob": math.log(likely[0][1]), "bytes": None, "top_logprobs": listed}


def saying(
    message: dict[str, Any], tokens: int, *, reason: str = "length", listed: dict[str, Any] | None = None
) -> Hook:
    """An answer in one piece, whole or as a stream."""

    async def play(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
        if listed is not None:
            choice["logprobs"] = {"content": [listed]}
        return await as_asked(request, body, {"choices": [choice], "usage": upstream.bill(body, tokens)})

    return play


def dying_after(words: int) -> Hook:
    """Its stream breaks off after so many words."""

    async def play(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await upstream.stream(request, body, upstream.words(body)[0][:words], None)

    return play


async def reset(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def failing(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"error": {"message": "down"}}, status=503)
