"""A new version of the policy file comes into force in every worker, and by SIGHUP in a gateway of one."""

import signal
from pathlib import Path

import aiohttp
import pytest

from tests.deploy.conftest import POLICY, Deployment, deployed
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


async def served_by(gateway: Deployment, session: aiohttp.ClientSession) -> str | None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "who are you?"}]}
    async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.headers()) as response:
        assert response.status == 200
        return response.headers.get("x-leadline-model")


async def test_every_worker_takes_a_new_policy(
    tmp_path: Path, two_workers: dict[str, str], upstream: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    policy = POLICY.format(url=upstream.url)
    async with deployed(tmp_path, policy, "--workers", "2", **two_workers) as gateway:
        assert await served_by(gateway, session) == "cheap"
        (tmp_path / "policy.yaml").write_text(policy.replace("  cheap:", "  cheaper:").replace("[cheap]", "[cheaper]"))
        await gateway.until(lambda: len(gateway.events("policy.loaded")) == 2, "both workers load it")
        assert {line["worker"] for line in gateway.events("policy.loaded")} == {0, 1}
        assert {await served_by(gateway, session) for _ in range(8)} == {"cheaper"}
        (tmp_path / "policy.yaml").write_text("version: 1\n")
        await gateway.until(lambda: len(gateway.events("policy.refused")) == 2, "both workers refuse it")
        assert {await served_by(gateway, session) for _ in range(8)} == {"cheaper"}


async def test_sighup_reads_the_policy_again(
    tmp_path: Path, upstream: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    policy = POLICY.format(url=upstream.url)
    async with deployed(tmp_path, policy) as gateway:
        (tmp_path / "policy.yaml").write_text(policy.replace("  cheap:", "  cheaper:").replace("[cheap]", "[cheaper]"))
        gateway.process.send_signal(signal.SIGHUP)
        await gateway.until(lambda: gateway.events("policy.loaded"), "the new policy")
        assert await served_by(gateway, session) == "cheaper"
