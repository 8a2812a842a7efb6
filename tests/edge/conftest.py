"""A gateway on a real port before a provider that speaks chat, completions and embeddings."""

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.edge.provider import Provider
from tests.gateway.conftest import Gateway, running

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 5s, retries: 0, breaker: off, api_key: env:EDGE_PROVIDER_KEY}}
models:
  chat: {{provider: fake, model: wire-chat, context: 16000, max_output: 1000,
         price: {{input: $1/Mtok, output: $2/Mtok}}}}
  talker: {{provider: fake, model: wire-talker, context: 16000, max_output: 1000, completes: false,
           price: {{input: $1/Mtok, output: $2/Mtok}}}}
  vectors: {{provider: fake, model: wire-vectors, context: 8000, embeds: true, price: {{input: $0.02/Mtok}}}}
{more}
"""
PROVIDER_KEY = "sk-provider-0123456789abcdef"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    running_provider = await Provider().start()
    yield running_provider
    await running_provider.stop()


StartEdge = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture
def start_edge(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartEdge:
    """Start a gateway before the provider; `more` is appended to the policy."""
    monkeypatch.setenv("EDGE_PROVIDER_KEY", PROVIDER_KEY)

    def start(more: str = "", **options: Any) -> AbstractAsyncContextManager[Gateway]:
        return running(POLICY.format(url=provider.url, more=more), tmp_path / "home", **options)

    return start


@pytest.fixture
async def edge(start_edge: StartEdge) -> AsyncIterator[Gateway]:
    async with start_edge() as gateway:
        yield gateway


async def post(gateway: Gateway, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, decoded body) of one call."""
    data = io.BytesIO(body) if isinstance(body, bytes) else None
    async with gateway.session.post(
        gateway.url + path, json=None if data is not None else body, data=data, headers=gateway.headers(**headers)
    ) as response:
        return response.status, response.headers, await response.json()
