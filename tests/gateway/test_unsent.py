"""A call that never went out costs nothing, however its request ended: nobody can have worked on it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.upstream.http import HttpClient, RequestHead
from tests.gateway.conftest import running, until
from tests.gateway.http.conftest import PATIENT, hangs
from tests.gateway.raw_server import raw_server

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers: {{far: {{base_url: "https://127.0.0.1:{port}/v1", timeout: 60s, retries: 0}}}}
models:
  strong: {{provider: far, model: strong, context: 16000, max_output: 2000,
           price: {{input: $3/Mtok, output: $15/Mtok}}}}
limits: [{{key: "*", budget: $10/month}}]
"""


@pytest.mark.parametrize("left", ["by its caller", "at its deadline"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_call_that_ends_while_it_connects_is_billed_nothing(tmp_path: Path, stream: bool, left: str) -> None:
    async with raw_server(hangs) as server, running(POLICY.format(port=server.port), tmp_path / "home") as gateway:
        body = {"model": "strong", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        headers = {"authorization": f"Bearer {gateway.key}"}
        if left == "at its deadline":
            headers["x-leadline-timeout"] = "3"
        async with httpx2.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers))
            await until(lambda: server.connections > 0)
            if left == "by its caller":
                asking.cancel()
                await asyncio.wait([asking])
            else:
                assert (await asking).status_code == 504
        await until(lambda: server.left == server.connections)
        row: dict[str, Any] = (await gateway.rows())[0]
    (attempt,) = row["attempt_rows"]
    assert attempt["outcome"] == ("cancelled" if left == "by its caller" else "deadline")
    assert (attempt["cost_nanousd"], attempt["output_tokens"], attempt["cost_estimated"]) == (0, 0, False)
    assert row["cost_nanousd"] == 0


async def test_a_request_that_went_out_is_said_to_have(tmp_path: Path) -> None:
    gone: list[str] = []
    client = HttpClient()
    async with raw_server(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok") as server:
        head = RequestHead("POST", f"http://127.0.0.1:{server.port}/")

        async def ask(body: bytes) -> None:
            response = await client.request(head, body, PATIENT, lambda: gone.append(body[:5].decode()))
            assert await response.read(100) == b"ok"
            response.release()

        bodies = [json.dumps(["one", "x"]).encode(), b"two  ", b"three" * 40_000]
        await asyncio.gather(*map(ask, bodies))
    assert sorted(gone) == ['["one', "three", "two  "]
    await client.close()
