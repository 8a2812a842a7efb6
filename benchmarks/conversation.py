"""How long the event loop stands still for one request of a long agent conversation.

    LEADLINE_HOME=… python benchmarks/conversation.py UPSTREAM_PORT SECONDS

Prints one line of JSON. The real application (edge, admission, cache key, decision, journal, client) runs in this
process; only uvicorn's parser is left out: the body arrives in three pieces that are already there. Every step of the
request's task is timed. The upstream waits 20 ms before its first event, so that what runs before then is what comes
before the upstream has the request. Hot: eight requests in a row, as under load. Cold: one, after a while of nothing.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any

import uvloop
from contenders import POLICY

from gateway.app import App
from gateway.edge.asgi import Message, Scope
from gateway.http_server import settle_memory
from gateway.settings import Settings
from routers.load import parse

MESSAGES = 466
BYTES = 148_000
BEFORE_ANSWER_NS = 10_000_000
ROW = 8
WORDS = (
    "the",
    "ledger",
    "of",
    "every",
    "call",
    "that",
    "a",
    "model",
    "made",
    "stays",
    "with",
    "whoever",
    "pays",
    "for",
)


def conversation() -> dict[str, Any]:
    """466 messages of an agent at work, tool calls and their results, 148 KB as JSON: the same each time."""
    rng = random.Random(466)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    messages: list[dict[str, Any]] = [{"role": "system", "content": text(180)}, {"role": "user", "content": text(60)}]
    while len(messages) < MESSAGES:
        number = len(messages)
        call = {"name": "read_file", "arguments": json.dumps({"path": f"src/part{number}.py", "lines": [1, number]})}
        tool = {"id": f"call_{number:06d}", "type": "function", "function": call}
        messages.append({"role": "assistant", "content": None, "tool_calls": [tool]})
        messages.append({"role": "tool", "tool_call_id": tool["id"], "content": ""})
    parameters = {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "array"}}}
    function = {"name": "read_file", "description": text(20), "parameters": parameters}
    body = {
        "model": "mock", "messages": messages, "tools": [{"type": "function", "function": function}],
        "max_tokens": 64, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    results = [message for message in messages if message["role"] == "tool"]
    room = BYTES - len(encoded(body))
    for place, message in enumerate(results):
        size = room * (place + 1) // len(results) - room * place // len(results)
        message["content"] = (text(size // 2))[:size]
    return body


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


class Timed(Coroutine[Any, Any, None]):
    """A coroutine whose steps are timed: when each began, and how long it held the loop."""

    def __init__(self, inner: Coroutine[Any, Any, None]) -> None:
        self._inner = inner
        self._steps: list[tuple[int, int]] = []

    def send(self, value: Any) -> Any:
        began = time.perf_counter_ns()
        try:
            return self._inner.send(value)
        finally:
            self._steps.append((began, time.perf_counter_ns() - began))

    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self._inner.__await__()

    def blocked_us(self) -> float:
        """All of its steps before the upstream's answer."""
        began = self._steps[0][0]
        return sum(took for at, took in self._steps if at - began < BEFORE_ANSWER_NS) / 1000


async def ask(app: App, key: str, body: bytes) -> float:
    """One request to its end, as the server would hand it over; returns how long it blocked, in µs.

    Raises RuntimeError for an answer without its end.
    """
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    answer: list[bytes] = []
    ended = asyncio.Event()

    async def receive() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answer.append(message.get("body", b""))

    scope: Scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "http_version": "1.1",
        "headers": [
            (b"host", b"gateway"), (b"authorization", f"Bearer {key}".encode()),
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
        ],
    }  # fmt: skip
    timed = Timed(app(scope, receive, send))
    await asyncio.create_task(timed)
    ended.set()
    if not b"".join(answer).endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"no stream to its end: {b''.join(answer)[-300:]!r}")
    return timed.blocked_us()


async def main(upstream: int, seconds: float) -> None:
    settings = Settings.from_env()
    settings.prepare_home()
    app = App(settings, parse(POLICY.format(upstream=upstream, signals="", rule="")), Path.cwd())
    await app.start()
    key = app.first_key or (settings.home / "key").read_text()
    settle_memory()
    long, short = conversation(), {**conversation(), "messages": [{"role": "user", "content": ""}] * 2, "tools": []}
    serial = 0

    def fresh(body: dict[str, Any]) -> bytes:
        nonlocal serial
        serial += 1
        first, second, *rest = body["messages"]
        numbered = {**second, "content": f"{serial:06d}{second['content'][6:]}"}  # nothing is answered from the cache
        return encoded({**body, "messages": [first, numbered, *rest]})

    found: dict[str, list[float]] = {"cold_us": [], "hot_us": [], "short_us": []}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found["cold_us"].append(await ask(app, key, fresh(long)))
        for name, body in (("hot_us", long), ("short_us", short)):
            found[name] += await asyncio.gather(*[ask(app, key, data) for data in [fresh(body) for _ in range(ROW)]])
    await app.stop()
    medians = {name: statistics.median(values[len(values) // 10 :]) for name, values in found.items()}
    print(json.dumps({"bytes": len(fresh(long)), "requests": serial, **medians}))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
