"""Several workers, one engine: their parent keeps it up, and each worker finds it again."""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import aiohttp
import psutil
import pytest

from local_engine.config import locate
from tests.deploy.conftest import PATIENCE_S, Deployment, deployed

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(240)]
POLICY = """
version: 1
providers: {home: {engine: embedded}}
models: {local: {provider: home, model: bundled/base, context: 1024}}
routes: [{name: auto, when: {model: auto}, use: [local], cache: off}]
"""


def engines(running: Deployment) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "gateway.engine_main" in child.cmdline():
                found.append(child)
    return found


async def answered_by_all(running: Deployment) -> None:
    """Every worker has an answer of the local model; a connection of its own for each call, so that all are met."""
    met: set[int] = set()
    async with asyncio.timeout(PATIENCE_S):
        while len(met) < 2:
            async with aiohttp.ClientSession() as session:
                body = {"model": "auto", "temperature": 0, "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
                async with session.post(
                    f"{running.url}/v1/chat/completions", json=body, headers=running.headers()
                ) as answer:
                    text = await answer.read()
                    assert answer.status in (200, 503), text
                    if answer.status == 200:
                        assert json.loads(text)["choices"][0]["message"]["content"] == "The answer is 5."
                async with session.get(f"{running.url}/metrics") as scrape:
                    lines = [line for line in (await scrape.text()).splitlines() if "leadline_requests_total{" in line]
                met |= {int(line.split('worker="')[1][0]) for line in lines if 'outcome="ok"' in line}


async def test_workers_share_an_engine_that_their_parent_keeps_up(tmp_path: Path, two_workers: dict[str, str]) -> None:
    async with deployed(tmp_path / "h", POLICY, "--workers", "2", **two_workers) as running:
        await answered_by_all(running)
        (first,) = engines(running)
        first.kill()
        await running.until(lambda: len(running.events("engine.link_lost")) == 2, "the workers did not notice")
        await running.until(lambda: len(running.events("engine.ready")) == 4, "the workers did not find it again")
        (second,) = engines(running)
        assert second.pid != first.pid
        assert {event["pid"] for event in running.events("engine.ready")} == {first.pid, second.pid}
        assert {event["worker"] for event in running.events("engine.ready")} == {0, 1}
        await answered_by_all(running)
        await running.roll()
        assert engines(running) == [second], "a rolling restart leaves the engine alone"
        async with aiohttp.ClientSession() as session:
            body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
            async with session.post(
                f"{running.url}/v1/chat/completions", json=body, headers=running.headers()
            ) as answer:
                assert answer.status == 200, "a replacement starts with its link"
    await asyncio.to_thread(second.wait, PATIENCE_S)


async def test_a_policy_with_a_new_local_model_gets_one_fresh_engine_for_all_workers(
    tmp_path: Path, two_workers: dict[str, str]
) -> None:
    async with deployed(tmp_path / "h", POLICY, "--workers", "2", **two_workers) as running:
        await answered_by_all(running)
        (first,) = engines(running)
        both = POLICY.replace("models: {local", "models: {small: {provider: home, model: bundled/nano}, local")
        file = running.home / "policy.yaml"
        file.write_text(both)
        await running.until(lambda: len(running.events("policy.loaded")) == 2, "the workers did not take the policy")
        async with aiohttp.ClientSession() as session:
            for _ in range(8):  # whichever worker answers
                body = {"model": "small", "max_tokens": 4, "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
                async with session.post(
                    f"{running.url}/v1/chat/completions",
                    json=body,
                    headers={**running.headers(), "connection": "close"},
                ) as answer:
                    assert answer.status == 200, await answer.text()
        await running.until(lambda: len(running.events("engine.left")) == 2, "the workers did not leave the old engine")
        await asyncio.to_thread(first.wait, PATIENCE_S)
        (second,) = engines(running)
        await running.roll()
        assert engines(running) == [second], "replacements come to the same engine"
        await answered_by_all(running)
        broken = running.home / "broken"
        shutil.copytree(locate("bundled/nano")[0], broken)
        for weights in broken.glob("*.safetensors"):
            weights.write_bytes(b"no weights")
        file.write_text(both.replace("bundled/nano", "./broken"))
        await running.until(lambda: len(running.events("policy.refused")) >= 2, "the workers did not refuse the policy")
        await running.until(lambda: engines(running) == [second], "what did not start is gone")
        await answered_by_all(running)
    await asyncio.to_thread(second.wait, PATIENCE_S)
