"""Whatever happens to Redis, no request fails for it, and each worker still holds the limits by itself."""

import asyncio
import contextlib
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis as blocking_redis

from gateway.admission.shared_rates import SharedRates
from gateway.app import App
from tests.conftest import free_port, start_redis, stop
from tests.gateway.conftest import Gateway, StartGateway, ask

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not on PATH"),
]

LIMIT = 40
LIMITS = f'limits: [{{key: "*", rate: {LIMIT}/h, concurrency: 50}}]'


@dataclass
class BadRedis:
    """A real Redis behind a wire that can be slow, or say that it is loading."""

    folder: Path
    port: int = field(default_factory=free_port)
    delay_s: float = 0.0
    loading: bool = False
    process: subprocess.Popen[bytes] | None = None
    _wire: asyncio.Server | None = None
    _ends: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> str:
        """Its address; the Redis behind it is not up yet."""
        self._wire = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._wire.sockets[0].getsockname()[1]}/0"

    async def up(self) -> None:
        self.process = await asyncio.to_thread(start_redis, self.folder, self.port)

    def admin(self, *command: str) -> None:
        with blocking_redis.Redis(port=self.port, socket_timeout=30) as client:
            client.execute_command(*command)

    async def down(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(stop, self.process)
        self.process = None

    async def close(self) -> None:
        await self.down()
        assert self._wire is not None
        self._wire.close()
        for end in self._ends:
            end.close()
        await self._wire.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            self._ends.add(back)
            await asyncio.gather(self._pump(reader, back), self._answer(there, writer))
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(b"-LOADING Redis is loading the dataset in memory\r\n" if self.loading else data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def bad_redis(tmp_path: Path) -> AsyncIterator[BadRedis]:
    bad = BadRedis(tmp_path)
    yield bad
    await bad.close()


def rates_of(app: App) -> SharedRates:
    rates = app.state.lifecycle._rates
    assert isinstance(rates, SharedRates)
    return rates


async def burst(gateway: Gateway, calls: int, token: str | None = None) -> list[tuple[int, str]]:
    """(status, what was degraded) of that many calls at once, no two alike, half of them cacheable."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    async def one(i: int) -> tuple[int, str]:
        model = "cheap" if i % 2 else "uncached"
        status, answer, _ = await gateway.chat(ask(f"{i} of {calls}", model=model), **headers)
        return status, answer.get("x-leadline-degraded", "")

    return await asyncio.gather(*(one(i) for i in range(calls)))


async def kill(bad: BadRedis) -> None:
    assert bad.process is not None
    bad.process.kill()
    await asyncio.to_thread(bad.process.wait)


async def pause(bad: BadRedis) -> None:
    assert bad.process is not None
    bad.process.send_signal(signal.SIGSTOP)


async def resume(bad: BadRedis) -> None:
    assert bad.process is not None
    bad.process.send_signal(signal.SIGCONT)


async def load(bad: BadRedis) -> None:
    bad.loading = True


async def slow_down(bad: BadRedis) -> None:
    bad.delay_s = 0.5


async def mend_wire(bad: BadRedis) -> None:
    bad.loading, bad.delay_s = False, 0.0


def command(*words: str) -> Callable[[BadRedis], "asyncio.Future[None]"]:
    return lambda bad: asyncio.ensure_future(asyncio.to_thread(bad.admin, *words))


FAULTS = {
    "killed": (kill, BadRedis.up),
    "paused": (pause, resume),
    "loading": (load, mend_wire),
    "slow": (slow_down, mend_wire),
    "out of memory": (command("CONFIG", "SET", "maxmemory", "1"), command("CONFIG", "SET", "maxmemory", "0")),
    "read-only replica": (command("REPLICAOF", "127.0.0.1", "1"), command("REPLICAOF", "NO", "ONE")),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_redis_that_fails_fails_no_request(
    fault: str, start_gateway: StartGateway, postgres_url: str, bad_redis: BadRedis
) -> None:
    strike, mend = FAULTS[fault]
    url = await bad_redis.start()
    await bad_redis.up()
    # A script that has freed something may still write when memory is short; with rates alone nothing is freed.
    limits = LIMITS.replace(", concurrency: 50", "") if fault == "out of memory" else LIMITS
    async with start_gateway(limits, database_url=postgres_url, redis_url=url) as gateway:
        healthy = await burst(gateway, 10)
        assert {status for status, _ in healthy} == {200}
        await strike(bad_redis)
        struck = await burst(gateway, 30) + await burst(gateway, 50)
        assert {status for status, _ in struck} == {200, 429}, "refused for its rate, or served; nothing else"
        assert sum(status == 200 for status, _ in healthy + struck) == LIMIT, "this worker holds the limit by itself"
        assert any("redis" in degraded for status, degraded in struck if status == 200)
        await mend(bad_redis)
        await healed(gateway)
        assert rates_of(gateway.app).statistics()["running"] == 0


async def healed(gateway: Gateway) -> None:
    """Calls of a fresh key until one of them has Redis's own word again."""
    rates_of(gateway.app)._link.timeout_s = 20.0  # a busy machine is not a Redis that is away
    keys = gateway.app.state.lifecycle.keys
    async with asyncio.timeout(60):
        for i in range(1000):
            token = keys.create(f"fresh{i}")
            answers = await burst(gateway, 1, token)
            assert answers[0][0] == 200
            if answers[0][1] == "":
                break
            await asyncio.sleep(0.2)
    assert rates_of(gateway.app)._link.up


async def test_a_redis_that_is_absent_at_start_is_found_later(
    start_gateway: StartGateway, postgres_url: str, bad_redis: BadRedis
) -> None:
    url = await bad_redis.start()
    async with start_gateway(LIMITS, database_url=postgres_url, redis_url=url) as gateway:
        answers = await burst(gateway, 100)
        assert sum(status == 200 for status, _ in answers) == LIMIT
        assert {status for status, _ in answers} == {200, 429}
        assert {degraded for status, degraded in answers if status == 200} == {"redis"}
        async with gateway.session.get(f"{gateway.url}/metrics") as response:
            assert "leadline_redis_up 0.0" in await response.text()
        async with gateway.session.get(f"{gateway.url}/health/readiness") as response:
            assert list((await response.json())["degraded"]) == ["redis"]
        await bad_redis.up()
        await healed(gateway)
        async with gateway.session.get(f"{gateway.url}/metrics") as response:
            assert "leadline_redis_up 1.0" in await response.text()


async def test_a_flushed_redis_starts_counting_again(
    start_gateway: StartGateway, postgres_url: str, bad_redis: BadRedis
) -> None:
    url = await bad_redis.start()
    await bad_redis.up()
    async with start_gateway(LIMITS, database_url=postgres_url, redis_url=url) as gateway:
        await healed(gateway)
        before = await burst(gateway, 100)
        assert sum(status == 200 for status, _ in before) == LIMIT
        await asyncio.to_thread(bad_redis.admin, "SCRIPT", "FLUSH")
        await asyncio.to_thread(bad_redis.admin, "FLUSHALL")
        after = await burst(gateway, 100)
        assert {status for status, _ in before + after} == {200, 429}
        assert sum(status == 200 for status, _ in after) == LIMIT


async def test_while_redis_is_away_nobody_waits_for_it(
    start_gateway: StartGateway, postgres_url: str, bad_redis: BadRedis
) -> None:
    url = await bad_redis.start()
    await bad_redis.up()
    async with start_gateway(LIMITS, database_url=postgres_url, redis_url=url) as gateway:
        await burst(gateway, 5)
        bad_redis.delay_s = 3600
        await burst(gateway, 5)
        rates = rates_of(gateway.app)
        assert not rates._link.up
        asked = rates.calls
        await burst(gateway, 60)
        assert rates.calls == asked


async def test_two_gateways_on_one_redis_do_not_double_a_limit(
    start_gateway: StartGateway, tmp_path: Path, postgres_url: str, bad_redis: BadRedis
) -> None:
    url = await bad_redis.start()
    await bad_redis.up()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pepper").write_bytes(b"p" * 32)
        (tmp_path / name / "key").write_text("the first gateway makes the first key")
    async with (
        start_gateway(LIMITS, home=tmp_path / "a", database_url=postgres_url, redis_url=url) as one,
        start_gateway(LIMITS, home=tmp_path / "b", database_url=postgres_url, redis_url=url) as two,
    ):
        for gateway in (one, two):  # it is Redis's arithmetic that is looked at
            await healed(gateway)
        token = one.app.state.lifecycle.keys.create("shared")
        answers = await asyncio.gather(burst(one, 50, token), burst(two, 50, token))
        assert sum(status == 200 for answer in answers for status, _ in answer) == LIMIT
        assert {status for answer in answers for status, _ in answer} == {200, 429}
