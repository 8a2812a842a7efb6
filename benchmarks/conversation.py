"""How long one request of a long agent conversation keeps the event loop from everybody else.

    LEADLINE_HOME=… python benchmarks/conversation.py UPSTREAM_PORT SECONDS

Prints one line of JSON. The real server runs in this process: protocol, edge, admission, cache key, decision, journal,
upstream client. Every step of a request's application is timed (uvicorn's parser and the sockets' reads are not in it).
The upstream waits 20 ms before its first event, so that what runs before then is what comes before the upstream has
the request. What others wait for is its longest step, as the loop turns to them between two; the sum of its steps is
what it costs. Hot: eight requests in a row, as under load. Cold: one, after a while of nothing.
"""

import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import uvloop
from contenders import POLICY

from gateway.app import App
from gateway.edge.asgi import Receive, Scope, Send
from gateway.edge.wire import read_chat
from gateway.http_server import HttpServer, settle_memory
from gateway.settings import Settings
from gateway.upstream.types import CallHeaders
from routers.load import parse

MESSAGES = 466
BYTES = 148_000
BEFORE_ANSWER_NS = 18_000_000
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


def read_us(body: bytes) -> float:
    """What is done with every byte of it in Python's sight: decoded, checked, and written anew for the upstream."""
    began = time.perf_counter_ns()
    msgspec.json.encode(read_chat(body, CallHeaders("")).fields)
    return (time.perf_counter_ns() - began) / 1000


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


class Timed:
    """An awaitable whose steps are timed: when each began, and how long it held the loop."""

    def __init__(self, inner: Coroutine[Any, Any, None]) -> None:
        self._inner = inner
        self._steps: list[tuple[int, int]] = []

    def __await__(self) -> Generator[Any, Any, None]:
        resume: Callable[[], Any] = partial(self._inner.send, None)
        while True:
            began = time.perf_counter_ns()
            try:
                waits_for = resume()
            except StopIteration:
                return
            finally:
                self._steps.append((began, time.perf_counter_ns() - began))
            try:
                resume = partial(self._inner.send, (yield waits_for))
            except BaseException as error:
                resume = partial(self._inner.throw, error)

    def steps_us(self) -> list[float]:
        """Of each of its steps before the upstream's answer."""
        began = self._steps[0][0]
        return [took / 1000 for at, took in self._steps if at - began < BEFORE_ANSWER_NS]


class TimedApp:
    """The application, each of whose requests is timed; the server cannot tell."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.calls: list[Timed] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Timed(self._app(scope, receive, send))
        self.calls.append(call)
        await call

    def slow_client(self, phase: Literal["headers", "body", "read"]) -> None:
        self._app.slow_client(phase)

    def take_us(self) -> list[list[float]]:
        """The steps of each call since the last time, before its answer, in µs."""
        calls, self.calls = self.calls, []
        return [call.steps_us() for call in calls]


async def ask(port: int, key: str, body: bytes) -> None:
    """One stream to its end. Raises RuntimeError for one without it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n") and (part := await reader.read(1 << 16)):
        answer += part
    writer.close()
    if b"data: [DONE]\n\n" not in answer:
        raise RuntimeError(f"no stream to its end: {answer[-300:]!r}")


def warm_median(values: list[float]) -> float:
    """Without the first tenth."""
    return statistics.median(values[len(values) // 10 :])


async def main(upstream: int, seconds: float) -> None:
    settings = Settings.from_env()
    settings.prepare_home()
    app = App(settings, parse(POLICY.format(upstream=upstream, signals="", rule="")), Path.cwd())
    timed = TimedApp(app)
    server, listener = HttpServer(timed, 0.0), socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(server.serve_on(listener))
    while not server.started:
        if serving.done():
            raise RuntimeError("the gateway did not start")
        await asyncio.sleep(0.01)
    settle_memory()
    key = app.first_key or (settings.home / "key").read_text()
    long, short = conversation(), {**conversation(), "messages": [{"role": "user", "content": ""}] * 2, "tools": []}
    serial = 0

    def fresh(body: dict[str, Any]) -> bytes:
        nonlocal serial
        serial += 1
        first, second, *rest = body["messages"]
        numbered = {**second, "content": f"{serial:06d}{second['content'][6:]}"}  # nothing is answered from the cache
        return encoded({**body, "messages": [first, numbered, *rest]})

    steps: dict[str, list[list[float]]] = {"cold": [], "hot": [], "short": []}
    read: list[float] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await ask(port, key, fresh(long))
        steps["cold"] += timed.take_us()
        read.append(read_us(encoded(long)))
        for name, body in (("hot", long), ("short", short)):
            await asyncio.gather(*[ask(port, key, data) for data in [fresh(body) for _ in range(ROW)]])
            steps[name] += timed.take_us()
    server.should_exit = True
    await serving
    found = {"bytes": len(fresh(long)), "requests": serial, "read_us": warm_median(read)}
    for name, calls in steps.items():
        found[f"{name}_longest_us"] = warm_median([max(call) for call in calls])
        found[f"{name}_all_us"] = warm_median([sum(call) for call in calls])
    print(json.dumps(found))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
