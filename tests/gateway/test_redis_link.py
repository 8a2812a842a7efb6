"""The link to Redis: 50 ms, then left alone until it is back, and no blame for a busy event loop."""

import asyncio
import time

import pytest

from gateway.redis_link import RedisAway, RedisLink
from tests.gateway.conftest import until

pytestmark = pytest.mark.anyio


async def fail(client: object) -> None:
    raise ConnectionError("gone")


async def test_one_that_failed_is_not_asked_until_it_is_back(redis_url: str) -> None:
    heard: list[bool] = []
    link = RedisLink(redis_url, heard.append, timeout_s=10, open_s=0.2)
    assert await link.check()
    with pytest.raises(RedisAway):
        await link.call(fail)
    asked: list[object] = []

    async def ask(client: object) -> str:
        asked.append(client)
        return "here"

    for _ in range(100):
        with pytest.raises(RedisAway):
            await link.call(ask)
    assert asked == []
    await until(lambda: link.up)
    assert await link.call(ask) == "here"
    assert heard == [True, False, True]
    await link.close()


async def test_one_that_is_absent_stays_away_and_is_closed_in_peace() -> None:
    heard: list[bool] = []
    link = RedisLink("redis://127.0.0.1:9/0", heard.append, open_s=0.01)
    assert not await link.check()
    await asyncio.sleep(0.1)
    assert not link.up
    assert heard == [False]
    await link.close()


async def test_a_redis_that_is_late_is_away(redis_url: str) -> None:
    link = RedisLink(redis_url, lambda up: None)

    async def late(client: object) -> None:
        await asyncio.sleep(3600)

    with pytest.raises(RedisAway):
        await link.call(late)
    assert not link.up
    await link.close()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": uvloop}) for uvloop in (False, True)])
async def test_redis_is_not_blamed_for_a_busy_event_loop(redis_url: str) -> None:
    link = RedisLink(redis_url, lambda up: None, timeout_s=20)
    assert await link.check()
    link.timeout_s = 0.05
    for _ in range(3):
        asking = asyncio.create_task(link.call(lambda client: client.echo("hello")))
        while not asking.done():
            await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251  # each turn of the loop takes twice the time limit
        assert await asking == b"hello"
    await link.close()
