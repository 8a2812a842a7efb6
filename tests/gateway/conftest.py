"""A gateway in the test's own event loop, on a real port, before a fake upstream on another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from gateway.app import App
from gateway.edge.protocol import GuardedProtocol
from gateway.ledger import browse, prices, report
from gateway.settings import Settings
from routers.load import parse
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.reasoner import Mind, Reasoner

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 60s, retries: 1}}
  dead: {{base_url: "http://127.0.0.1:9/v1", timeout: 1s, retries: 0}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: fake, model: dear, context: 128000, max_output: 4000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, output: $10/Mtok}}}}
  gone: {{provider: dead, model: gone, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  free: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: free}}
routes:
  - name: auto
    when: {{model: auto}}
    objective: cheapest
    candidates: [cheap, dear]
    on_failure: [dear]
  - name: fragile
    when: {{model: fragile}}
    use: [gone]
    on_failure: [cheap]
  - name: uncached
    when: {{model: uncached}}
    use: [cheap]
    cache: off
{limits}
"""


@dataclass
class Gateway:
    """One running gateway and the ways to look at it."""

    app: App
    url: str
    key: str
    session: aiohttp.ClientSession
    server: uvicorn.Server

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **more}

    async def chat(self, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, decoded body) of one plain call."""
        data = body if isinstance(body, bytes) else None
        async with self.session.post(
            f"{self.url}/v1/chat/completions", json=None if data else body, data=data, headers=self.headers(**headers)
        ) as response:
            return response.status, response.headers, await response.json()

    async def stream(self, body: dict[str, Any], **headers: str) -> tuple[int, Any, bytes]:
        """(status, headers, raw bytes) of one streamed call."""
        async with self.session.post(
            f"{self.url}/v1/chat/completions", json={**body, "stream": True}, headers=self.headers(**headers)
        ) as response:
            return response.status, response.headers, await response.read()

    async def left_alone(self) -> None:
        """Returns when all that was sent is read, answered and settled. Its callers have closed their connections."""
        for _ in range(100):  # turns of the loop, in which what has arrived is accepted and read
            await asyncio.sleep(0)
        state = self.server.server_state
        await until(lambda: not state.connections and not state.tasks)

    async def rows(self) -> list[dict[str, Any]]:
        """Every request in the ledger, newest first, with its attempts."""
        lifecycle = self.app.state.lifecycle
        await lifecycle.ledger.flush(60)
        engine = lifecycle.ledger.engine
        rows = await asyncio.to_thread(browse.page, engine, browse.Slice(), limit=10_000)
        for row in rows:
            found = await asyncio.to_thread(report.request, engine, row["id"])
            assert found is not None
            row["attempt_rows"] = found[1]
            row["decision"], row["plan"] = found[0]["decision"], found[0]["plan"]
        return rows


async def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait for something that another process or task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    policy: str,
    home: Path,
    *,
    database_url: str | None = None,
    redis_url: str | None = None,
    engine: Path | None = None,
    policy_folder: Path | None = None,
    policy_file: Path | None = None,
    durability: str = "process",
    http: type[GuardedProtocol] = GuardedProtocol,
) -> AsyncIterator[Gateway]:
    settings = Settings.from_env(
        {
            "LEADLINE_HOME": str(home),
            "LEADLINE_DURABILITY": durability,
            **({"DATABASE_URL": database_url} if database_url else {}),
            **({"REDIS_URL": redis_url} if redis_url else {}),
            **({"LEADLINE_ENGINE": str(engine)} if engine else {}),
        }
    )
    app = App(settings, parse(policy, prices=prices.lookup), policy_folder, policy_file)
    config = uvicorn.Config(
        app, port=0, http=http, ws="none", lifespan="on", log_level="error", access_log=False, proxy_headers=False,
        server_header=False, date_header=False,  # as `HttpServer`: else no answer takes the short way out
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done(), "the gateway did not start"
        await asyncio.sleep(0.005)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    key = app.first_key or (home / "key").read_text()
    try:
        async with aiohttp.ClientSession() as session:
            yield Gateway(app, url, key, session, server)
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def far() -> AsyncIterator[Reasoner]:
    """A server of two models that think."""
    upstream = await Reasoner({"base": Mind(), "draft": Mind()}).start()
    yield upstream
    await upstream.stop()


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    fake = await FakeUpstream().start()
    yield fake
    await fake.stop()


StartGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture
def start_gateway(upstream: FakeUpstream, tmp_path: Path) -> StartGateway:
    """Start a gateway before the fake upstream; `limits` are the policy's limits section.

    A call that takes longer than `timeout` is asked again: no busy machine is to make it so.
    """

    def start(
        limits: str = "", home: Path | None = None, *, timeout: str = "60s", **options: Any
    ) -> AbstractAsyncContextManager[Gateway]:
        policy = POLICY.replace("timeout: 60s", f"timeout: {timeout}").format(url=upstream.url, limits=limits)
        return running(policy, home or tmp_path / "home", **options)

    return start


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> AsyncIterator[Gateway]:
    async with start_gateway() as running_gateway:
        yield running_gateway


def ask(text: str = "hello there", model: str = "cheap", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}
