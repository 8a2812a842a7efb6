"""T26: rolling restarts, a drain and a killed worker under load, on real servers: nothing is dropped, the ledger is
exact. And what is refused instead of being wrong: several gateways that would each grant the whole of every limit."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from tests.conftest import Size, free_port
from tests.deploy.conftest import PATIENCE_S, POLICY, ROOT, Deployment, deployed, environment
from tests.gateway.conftest import until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

RATE_PER_S = 100
STREAM_EVERY = 10
"""One request in so many is a stream of about two seconds."""
RESTARTS, SOAK_RESTARTS = 3, 50


class Load:
    """Open-loop traffic at a steady rate, and what each caller got."""

    def __init__(self, target: Deployment, session: aiohttp.ClientSession, rate_per_s: float) -> None:
        self._target = target
        self._headers = target.headers()
        self._session = session
        self._pause_s = 1 / rate_per_s
        self._calls: set[asyncio.Task[None]] = set()
        self._sending = True
        self.sent = 0
        self._heard = 0
        """Those whose answers have begun, or that are dropped."""
        self.ids: list[str] = []
        self.dropped: list[str] = []
        self._task = asyncio.create_task(self._send())

    def _begin(self) -> None:
        self.sent += 1
        call = asyncio.create_task(self._call(self.sent))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _send(self) -> None:
        due = time.monotonic()
        while self._sending:
            self._begin()
            due = max(due + self._pause_s, time.monotonic() - 1)  # late by more than a second: not made up for
            await asyncio.sleep(max(0, due - time.monotonic()))

    async def _call(self, number: int) -> None:
        stream = number % STREAM_EVERY == 0
        body: dict[str, Any] = {"model": "cheap", "messages": [{"role": "user", "content": f"number {number}"}]}
        try:
            async with self._session.post(
                f"{self._target.url}/v1/chat/completions", json={**body, "stream": stream}, headers=self._headers
            ) as response:
                self._heard += 1
                text = await response.read()
                if response.status != 200 or (stream and not text.endswith(b"data: [DONE]\n\n")):
                    self.dropped.append(f"{number}: {response.status} {text[-200:]!r}")
                self.ids.append(response.headers["x-request-id"])
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._heard += 1
            self.dropped.append(f"{number}: {error!r}")

    async def stop(self) -> None:
        """No new requests; those under way go on. None still waits in its client: the last of them is a stream."""
        self._sending = False
        await self._task
        await until(lambda: self._heard >= self.sent)
        self._begin()
        while self.sent % STREAM_EVERY:
            self._begin()
        await until(lambda: self._heard >= self.sent)

    async def finish(self) -> None:
        await asyncio.wait_for(asyncio.gather(*tuple(self._calls)), PATIENCE_S)


async def test_rolling_restarts_and_a_drain_drop_nothing(
    tmp_path: Path, two_workers: dict[str, str], upstream: FakeUpstream, session: aiohttp.ClientSession, size: Size
) -> None:
    upstream.pace_s = 0.17  # between the words of a stream
    async with deployed(tmp_path / "h", POLICY.format(url=upstream.url), "--workers", "2", **two_workers) as running:
        first = {worker.pid for worker in running.workers()}
        load = Load(running, session, RATE_PER_S)
        for _ in range(size(RESTARTS, SOAK_RESTARTS)):
            before = {worker.pid for worker in running.workers()}
            await running.roll()
            after = {worker.pid for worker in running.workers()}
            assert len(after) == 2
            assert not after & before, "every worker was replaced"
        await load.stop()
        assert upstream.open_streams, "the drain has streams to wait for"
        running.process.send_signal(signal.SIGTERM)
        await load.finish()
        assert await asyncio.to_thread(running.process.wait, PATIENCE_S) == 0
        assert load.dropped == []
        assert {event["replaced"] for event in running.events("restart.ends")} == {2}
        assert [event["signal"] for event in running.events("drain.begins")] == ["SIGTERM"]
        assert not running.events("worker.died")
        assert not running.events("drain.cancelled")
    assert len(load.ids) == load.sent
    with psycopg.connect(two_workers["DATABASE_URL"]) as database:
        rows = database.execute("SELECT id, outcome, cost_nanousd FROM request").fetchall()
    assert sorted(row[0] for row in rows) == sorted(load.ids), "one row for each request, and no other"
    assert {row[1] for row in rows} == {"ok"}
    assert sum(row[2] for row in rows) == sum(bill.nanousd for bill in upstream.truth)
    assert first
    left = [path for path in (tmp_path / "h" / "journal").rglob("*.log") if path.stat().st_size]
    assert left == [], "all of the journal is in SQL"


async def test_a_killed_worker_is_replaced_and_its_journal_replayed(
    tmp_path: Path, two_workers: dict[str, str], upstream: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    upstream.pace_s = 0.5
    async with deployed(tmp_path / "h", POLICY.format(url=upstream.url), "--workers", "2", **two_workers) as running:
        asked = {"model": "cheap", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with session.post(
            f"{running.url}/v1/chat/completions", json=asked, headers=running.headers()
        ) as response:
            await response.content.readany()
            cut = response.headers["x-request-id"]
            served = await _worker_of(running, response)
            served.kill()
            assert b"[DONE]" not in await _rest(response)
        upstream.pace_s = 0.0
        other = [worker for worker in running.workers() if worker.pid != served.pid]
        assert other, "the other worker goes on"
        await running.until(lambda: len(running.workers()) == 2, "the worker was not started again")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with (
                    aiohttp.ClientSession() as fresh,
                    fresh.get(f"{running.url}/leadline/v1/requests/{cut}", headers=running.headers()) as receipt,
                ):
                    if receipt.status == 200:
                        row = await receipt.json()
                        break
                await asyncio.sleep(0.05)
    assert row["outcome"] == "interrupted"
    assert row["cost_nanousd"] > 0
    assert row["cost_estimated"]


async def _rest(response: aiohttp.ClientResponse) -> bytes:
    """What still comes, until the stream ends or breaks."""
    rest = b""
    with contextlib.suppress(aiohttp.ClientError):
        while piece := await response.content.readany():
            rest += piece
    return rest


async def _worker_of(running: Deployment, response: aiohttp.ClientResponse) -> Any:
    """The process at the other end of this connection."""
    assert response.connection is not None
    assert response.connection.transport is not None
    port = response.connection.transport.get_extra_info("sockname")[1]
    for worker in running.workers():
        if any(link.raddr and link.raddr.port == port for link in worker.net_connections("tcp")):
            return worker
    raise AssertionError("no worker holds this connection")


async def test_every_worker_is_in_one_scrape(
    tmp_path: Path, two_workers: dict[str, str], upstream: FakeUpstream
) -> None:
    async with deployed(tmp_path / "h", POLICY.format(url=upstream.url), "--workers", "2", **two_workers) as running:
        served = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:  # a connection of its own for each: the kernel spreads them
                async with aiohttp.ClientSession() as fresh:
                    body = {"model": "cheap", "messages": [{"role": "user", "content": f"number {served}"}]}
                    async with fresh.post(
                        f"{running.url}/v1/chat/completions", json=body, headers=running.headers()
                    ) as answer:
                        assert answer.status == 200
                        served += 1
                        request_id = answer.headers["x-request-id"]
                    async with fresh.get(f"{running.url}/metrics") as scrape:
                        text = await scrape.text()
                counts = [
                    (line.split('worker="')[1][0], float(line.rsplit(" ", 1)[1]))
                    for line in text.splitlines()
                    if line.startswith("leadline_requests_total{")
                ]
                assert sum(count for _, count in counts) == served
                if {worker for worker, _ in counts} == {"0", "1"}:
                    break
        assert text.count("# TYPE leadline_requests_total counter") == 1
        for _ in range(8):  # whichever worker is asked
            async with (
                aiohttp.ClientSession() as fresh,
                fresh.get(f"{running.url}/leadline/v1/requests/{request_id}", headers=running.headers()) as receipt,
            ):
                assert receipt.status == 200
        one = running.process.pid
        assert running.workers()[0].parent().pid == one


async def test_a_replacement_that_cannot_start_leaves_the_old_worker(
    tmp_path: Path, two_workers: dict[str, str], upstream: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    policy = POLICY.format(url=upstream.url)
    async with deployed(tmp_path / "h", policy, "--workers", "2", **two_workers) as running:
        before = {worker.pid for worker in running.workers()}
        (running.home / "policy.yaml").write_text("version: 1\nprovidrs: {}\n")
        await running.roll()
        assert {worker.pid for worker in running.workers()} == before
        assert len(running.events("restart.failed")) == 2
        assert "providrs" in running.events("worker.cannot_serve")[0]["error"]
        (running.home / "policy.yaml").write_text(policy.replace("name: auto", "name: renamed"))
        await running.roll()
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        async with session.post(f"{running.url}/v1/chat/completions", json=body, headers=running.headers()) as answer:
            assert answer.headers["x-leadline-route"] == "renamed", "a rolling restart reads the policy again"


def _refused(home: Path, *options: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--port", str(free_port()), *options],
        env=environment(home, **env), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(url="http://127.0.0.1:9/v1"))
    return str(file)


async def test_several_workers_without_shared_state_are_refused(tmp_path: Path, policy_file: str) -> None:
    said = _refused(tmp_path, "--policy", policy_file, "--workers", "2")
    assert "--workers 2" in said
    assert "REDIS_URL is not set" in said
    assert "DATABASE_URL names no PostgreSQL" in said
    said = _refused(tmp_path, "--policy", policy_file, LEADLINE_SHARED="1", REDIS_URL="redis://127.0.0.1:9/0")
    assert "LEADLINE_SHARED=1" in said
    assert "REDIS_URL is not set" not in said
    assert "postgresql://USER:PASSWORD@HOST/DB" in said


async def test_a_second_gateway_that_does_not_share_its_limits_is_refused(
    tmp_path: Path, policy_file: str, two_workers: dict[str, str], upstream: FakeUpstream
) -> None:
    alone = {"DATABASE_URL": two_workers["DATABASE_URL"]}
    policy = POLICY.format(url=upstream.url)
    async with deployed(tmp_path / "h", policy, **alone) as running:
        said = await asyncio.to_thread(_refused, tmp_path / "second", "--policy", policy_file, **alone)
        assert "another gateway is running on this database" in said
        assert "REDIS_URL" in said
        said = await asyncio.to_thread(_refused, tmp_path / "third", "--policy", policy_file, **two_workers)
        assert "without REDIS_URL" in said
        said = await asyncio.to_thread(_refused, running.home, "--policy", policy_file, **alone)
        assert "another gateway is running on" in said
        assert "LEADLINE_HOME" in said
    async with (
        deployed(tmp_path / "h", policy, "--workers", "2", **two_workers),
        deployed(tmp_path / "second", policy, **two_workers),
    ):
        said = await asyncio.to_thread(_refused, tmp_path / "third", "--policy", policy_file, **alone)
        assert "another gateway is running on this database" in said
