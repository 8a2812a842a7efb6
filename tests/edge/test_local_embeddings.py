"""`/v1/embeddings` on the local engine: the bundled encoder, with nothing else loaded."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest

from local_engine.config import locate
from tests.edge.conftest import post
from tests.gateway.conftest import Gateway, running

pytestmark = [pytest.mark.anyio, pytest.mark.engine]
POLICY = """
version: 1
providers: {home: {engine: embedded}}
models: {encoder: {provider: home, model: default, embeds: true}}
"""


async def health(edge: Gateway) -> dict[str, Any]:
    async with edge.session.get(f"{edge.url}/health/readiness") as answer:
        found: dict[str, Any] = await answer.json()
    return found


async def test_the_local_encoder_embeds_beside_the_ledger(tmp_path: Path) -> None:
    async with running(POLICY, tmp_path / "home") as edge:
        assert edge.app.engine is not None
        async with asyncio.timeout(90):
            await edge.app.engine.ready.wait()
        assert (await health(edge))["unavailable"] == {}
        texts = ["the cat sleeps", "a cat is sleeping", "interest rates rose"]
        async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key) as client:
            packed = await client.embeddings.create(model="encoder", input=texts)
        plain = await post(edge, "/v1/embeddings", {"model": "encoder", "input": texts, "encoding_format": "float"})
        vectors = [entry.embedding for entry in packed.data]
        for vector, entry in zip(vectors, plain[2]["data"], strict=True):
            assert vector == pytest.approx(entry["embedding"], abs=1e-6)

        def alike(a: int, b: int) -> float:
            return sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))

        assert alike(0, 0) == pytest.approx(1, abs=1e-4)
        assert alike(0, 1) > 0.6 > 0.3 > alike(0, 2)
        row = (await edge.rows())[0]
        assert (row["endpoint"], row["outcome"], row["cost_nanousd"]) == ("embeddings", "ok", 0)
        assert row["input_tokens"] == plain[2]["usage"]["prompt_tokens"] > 9
        for body, param in (
            ({"model": "encoder", "input": [1, 2, 3]}, "input"),
            ({"model": "encoder", "input": "x", "dimensions": 5}, "dimensions"),
        ):
            status, _, answer = await post(edge, "/v1/embeddings", body)
            assert (status, answer["error"]["param"]) == (400, param)
        assert (await post(edge, "/v1/completions", {"model": "encoder", "prompt": "x"}))[0] == 400


async def test_an_encoder_whose_engine_is_down_is_told_as_unavailable(tmp_path: Path) -> None:
    """Of a folder that looks whole, and is not."""
    shutil.copytree(locate("bundled/nano")[0], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    both = "models: {base: {provider: home, model: bundled/base}, "
    mine = POLICY.replace("default", "./broken").replace("models: {", both)
    async with running(mine, tmp_path / "home", policy_folder=tmp_path) as edge:
        assert edge.app.engine_process is not None
        async with asyncio.timeout(90):
            await edge.app.engine_process.failed.wait()
        told = await health(edge)
        down = "the engine process is not up"
        assert (told["status"], told["unavailable"]) == ("not_ready", {"base": down, "encoder": down})
        status, _, answer = await post(edge, "/v1/embeddings", {"model": "encoder", "input": "x"})
        assert (status, answer["error"]["code"]) == (503, "unavailable")
