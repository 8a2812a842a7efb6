"""Two workers: feedback is taken by whichever is asked, and shadows spend the budget that all of them share."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from sqlalchemy import create_engine, func, select
from sqlmodel import col

from gateway.ledger import budget_rows
from gateway.ledger.tables import BudgetRow, RequestRow
from gateway.settings import Settings
from tests.admission.books import snapshot
from tests.deploy.conftest import PATIENCE_S, POLICY, deployed
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio
MORE = """  - {name: learn, when: {model: learn}, use: [cheap], cache: off, shadow: {models: [other], share: 100%}}
limits: [{key: "*", budget: $1/total}]
"""


@pytest.mark.timeout(300)
async def test_any_worker_takes_feedback_and_shadows_spend_the_shared_budget(
    tmp_path: Path, upstream: FakeUpstream, session: aiohttp.ClientSession, two_workers: dict[str, str]
) -> None:
    policy = POLICY.format(url=upstream.url)
    cheap = policy[policy.index("  cheap:") : policy.index("routes:")]
    policy = policy.replace("routes:", cheap.replace("  cheap:", "  other:", 1) + "routes:") + MORE
    async with deployed(tmp_path / "home", policy, "--workers", "2", **two_workers) as gateway:
        headers = {**gateway.headers(), "Connection": "close"}  # each call may fall to the other worker

        async def one(number: int) -> list[int]:
            body = {"model": "learn", "messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 100}
            async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
                statuses, request_id = [response.status], response.headers["x-request-id"]
            for said in ({"accept": True}, {"reject": True}, {"score": 0.9, "source": "qa"}):
                url = f"{gateway.url}/leadline/v1/requests/{request_id}/feedback"
                async with session.post(url, json=said, headers=headers) as response:
                    statuses.append(response.status)
            return statuses

        found = await asyncio.gather(*(one(number) for number in range(16)))
        assert found == [[200] * 4] * 16
        async with session.get(f"{gateway.url}/leadline/v1/spend", headers=headers) as response:
            spend = await response.json()
        assert (spend["rated"], spend["accepted"]) == (16, 0)  # (0 + 0.9) / 2

        async def shadowed() -> float:
            async with session.get(f"{gateway.url}/metrics", headers=headers) as response:
                lines = (await response.text()).splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("leadline_shadows_total{"))

        async with asyncio.timeout(PATIENCE_S):
            while await shadowed() < 16:  # one that is cut off by the end is billed as an estimate
                await asyncio.sleep(0.05)
    engine = create_engine(Settings.from_env({"DATABASE_URL": two_workers["DATABASE_URL"]}).database_url)
    with snapshot(engine) as connection:
        assert budget_rows.integrity(connection) == []
        (budget,) = connection.execute(select(BudgetRow.__table__)).all()  # type: ignore[attr-defined]
        shadows = select(func.count()).where(col(RequestRow.parent).is_not(None))
        cast = connection.execute(shadows).scalar_one()
        booked = connection.execute(select(func.sum(col(RequestRow.cost_nanousd)))).scalar_one()
    engine.dispose()
    assert 0 < cast <= 16
    assert budget.spent_nanousd == booked == sum(bill.nanousd for bill in upstream.truth)
    assert budget.reserved_nanousd == 0
    assert len(upstream.truth) == 16 + cast
