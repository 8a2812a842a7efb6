"""What a caller sees of a price, or of a database, that is not there; who holds a hard budget, and who does not."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from gateway.ledger import store
from tests.gateway.conftest import ask, running
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 5s, retries: 0}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  ghost: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: unpriced}}
{limits}
"""
ROUTE_AND_LIMIT = """
  dear: {{provider: fake, model: dear, context: 16000, max_output: 1000, price: {{input: $5/Mtok, output: $5/Mtok}}}}
routes: [{{name: auto, when: {{model: auto}}, use: [dear, cheap]}}]
limits: [{{key: first, budget: $0.0076/month, at: {{1%: cheaper}}}}]
"""
LIMITED = 'limits: [{key: "*", budget: $1000/month}]'


async def test_without_a_price_a_hard_budget_refuses_before_anything_is_sent(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    async with running(POLICY.format(url=upstream.url, limits=LIMITED), tmp_path / "home") as gateway:
        status, headers, body = await gateway.chat(ask(model="ghost"))
        assert (status, headers["x-should-retry"]) == (429, "false")
        assert "its price is not known, and a budget cannot hold for it" in body["error"]["message"]
        assert upstream.bodies == []
        assert (await gateway.chat(ask(model="cheap")))[0] == 200


async def test_without_a_price_others_are_served_and_their_rows_say_so(upstream: FakeUpstream, tmp_path: Path) -> None:
    async with running(POLICY.format(url=upstream.url, limits=""), tmp_path / "home") as gateway:
        status, headers, _ = await gateway.chat(ask(model="ghost"))
        assert (status, headers["x-leadline-cost-nanousd"]) == (200, "unpriced")
        (row,) = await gateway.rows()
        assert row["cost_nanousd"] is None
        async with gateway.session.get(f"{gateway.url}/metrics", headers=gateway.headers()) as response:
            assert "leadline_unpriced_requests_total 1.0" in await response.text()


async def test_while_sql_is_away_calls_go_to_the_journal_until_it_is_full(
    upstream: FakeUpstream, tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_PENDING", 5)
    policy = POLICY.format(url=upstream.url, limits="")
    locker = create_engine(postgres_url)
    async with running(policy, tmp_path / "home", database_url=postgres_url) as gateway:
        with locker.connect() as connection:
            await asyncio.to_thread(connection.exec_driver_sql, "LOCK TABLE request IN ACCESS EXCLUSIVE MODE")
            answers = [await gateway.chat(ask(f"number {i}")) for i in range(8)]
        assert [status for status, _, _ in answers] == [200] * 5 + [503] * 3
        _, headers, body = answers[-1]
        assert (body["error"]["code"], headers["x-should-retry"]) == ("unavailable", "true")
        assert int(headers["retry-after"]) >= 1
        rows = await gateway.rows()
        assert len(rows) == len(upstream.bodies) == 5
        assert (await gateway.chat(ask("again")))[0] == 200
    locker.dispose()


async def test_readiness_says_what_the_gateway_does_without(
    upstream: FakeUpstream, tmp_path: Path, postgres_url: str
) -> None:
    server, name = postgres_url.rsplit("/", 1)
    admin = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    policy = POLICY.format(url=upstream.url, limits="")
    async with running(policy, tmp_path / "home", database_url=postgres_url) as gateway:

        async def readiness() -> tuple[int, str, dict[str, str]]:
            async with gateway.session.get(f"{gateway.url}/health/readiness") as response:
                told = await response.json()
                return response.status, told["status"], told["degraded"]

        assert await readiness() == (200, "ready", {})
        with admin.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.exec_driver_sql(
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'"
            )
            try:
                assert (await gateway.chat(ask()))[0] == 200
                status, word, degraded = await readiness()
                assert (status, word) == (200, "ready")
                assert degraded == {"database": "does not answer; the journal keeps the rows for it (1 now)"}
            finally:
                connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        async with asyncio.timeout(60):
            while (await readiness())[2]:
                await asyncio.sleep(0.2)
        assert len(await gateway.rows()) == 1
    admin.dispose()


async def test_what_a_tight_budget_had_answered_is_not_kept_for_those_who_have_money(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    policy = POLICY.replace("\n{limits}\n", ROUTE_AND_LIMIT).format(url=upstream.url)
    async with running(policy, tmp_path / "home") as gateway:
        rich = gateway.app.state.lifecycle.keys.create("rich")
        assert (await gateway.chat(ask("first", model="auto", max_tokens=20)))[1]["x-leadline-model"] == "dear"
        for _ in range(2):
            _, headers, _ = await gateway.chat(ask(model="auto", max_tokens=20))
            assert (headers["x-leadline-model"], headers["x-leadline-cache"]) == ("cheap", "miss")
        for kept in ("miss", "hit"):
            _, headers, _ = await gateway.chat(ask(model="auto", max_tokens=20), authorization=f"Bearer {rich}")
            assert (headers["x-leadline-model"], headers["x-leadline-cache"]) == ("dear", kept)
