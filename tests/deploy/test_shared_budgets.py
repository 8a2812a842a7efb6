"""Two workers behind one port, one budget: together they grant it once."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from sqlalchemy import create_engine, select

from gateway.ledger import budget_rows
from gateway.ledger.tables import BudgetRow
from gateway.settings import Settings
from tests.admission.books import snapshot
from tests.deploy.conftest import POLICY, deployed
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio


@pytest.mark.timeout(300)
async def test_two_workers_grant_one_budget_once(
    tmp_path: Path, upstream: FakeUpstream, session: aiohttp.ClientSession, two_workers: dict[str, str]
) -> None:
    policy = POLICY.format(url=upstream.url) + 'limits: [{key: "*", budget: $0.0006/total}]\n'
    async with deployed(tmp_path / "home", policy, "--workers", "2", **two_workers) as gateway:

        async def call(number: int) -> int:
            body = {"model": "cheap", "messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 100}
            headers = {**gateway.headers(), "Connection": "close"}
            async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
                return response.status

        statuses = await asyncio.gather(*(call(number) for number in range(96)))
    assert set(statuses) == {200, 429}
    spent = sum(bill.nanousd for bill in upstream.truth)
    engine = create_engine(Settings.from_env({"DATABASE_URL": two_workers["DATABASE_URL"]}).database_url)
    with snapshot(engine) as connection:
        assert budget_rows.integrity(connection) == []
        (row,) = connection.execute(select(BudgetRow.__table__)).all()  # type: ignore[attr-defined]
    engine.dispose()
    assert spent == row.spent_nanousd <= 600_000
    assert row.reserved_nanousd == 0
    assert len(upstream.truth) == statuses.count(200)
