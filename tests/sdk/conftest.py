"""A real gateway process before a small upstream on loopback that answers as OpenAI does."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web

from gateway.sdk import AsyncLeadline, Leadline
from tests.conftest import free_port, stop, wait_for_port

PROMPT_TOKENS, COMPLETION_TOKENS = 40, 10
COST_NANOUSD = {"small": 40 * 250 + 10 * 2000, "large": 40 * 1250 + 10 * 10000}
"""Of one answer of the upstream, by the prices below."""
POLICY = """
version: 1
providers:
  near: {{base_url: "http://127.0.0.1:{port}/v1", retries: 0}}
models:
  small:
    {{provider: near, model: s1, context: 8000, max_output: 1000, price: {{input: $0.25/Mtok, output: $2/Mtok}}}}
  large:
    {{provider: near, model: l1, context: 8000, max_output: 1000, price: {{input: $1.25/Mtok, output: $10/Mtok}}}}
routes:
  - name: private
    when: {{tag: private}}
    use: [small]
  - name: auto
    when: {{model: auto}}
    candidates: [small, large]
    objective: cheapest
"""


@dataclass
class FakeUpstream:
    """Counts what it is asked."""

    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.requests.append(asked)
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        }
        head = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        if not asked.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        head["object"] = "chat.completion.chunk"
        for delta, reason in (({"role": "assistant", "content": "Hel"}, None), ({"content": "lo."}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            await response.write(_event({**head, "choices": [choice]}))
        await response.write(_event({**head, "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + web.json_response(chunk).body + b"\n\n"  # type: ignore[operator]


@pytest.fixture(scope="session")
def upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    up = threading.Event()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", fake.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.port = runner.addresses[0][1]
        up.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), name="upstream")
    thread.start()
    assert up.wait(60)
    yield fake
    loop.call_soon_threadsafe(ended.set)
    thread.join(60)
    loop.close()


@pytest.fixture(scope="session")
def home(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The base URL and the key of a gateway process."""
    folder = tmp_path_factory.mktemp("sdk")
    (folder / "policy.yaml").write_text(POLICY.format(port=upstream.port))
    port = free_port()
    process = subprocess.Popen(
        [Path(sys.executable).parent / "leadline", "serve", "--port", str(port), "--policy", folder / "policy.yaml"],
        env={**os.environ, "LEADLINE_HOME": str(folder / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        httpx2.get(f"http://127.0.0.1:{port}/health/liveness", timeout=30).raise_for_status()
        yield f"http://127.0.0.1:{port}/v1", (folder / "home" / "key").read_text()
    finally:
        stop(process)


NO_STORE = {"cache-control": "no-store"}
"""Keeps the gateway's answer cache out of the tests that count money."""


@pytest.fixture
def client(home: tuple[str, str]) -> Iterator[Leadline]:
    base_url, key = home
    with Leadline(api_key=key, base_url=base_url, default_headers=NO_STORE) as made:
        yield made


@pytest.fixture
async def async_client(home: tuple[str, str]) -> AsyncIterator[AsyncLeadline]:
    base_url, key = home
    async with AsyncLeadline(api_key=key, base_url=base_url, default_headers=NO_STORE) as made:
        yield made
