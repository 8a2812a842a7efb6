"""Keys, rates and budgets."""

import asyncio
import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.budgets import Budget, Hold, reserve, window_start_ms
from gateway.admission.keys import KeyNameError, KeyStore, load_pepper
from gateway.errors import BudgetExceeded, Unauthenticated
from gateway.ledger.store import connect
from routers.units import Window
from tests.gateway.conftest import Gateway, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio


@pytest.fixture
def keys(tmp_path: Path, database_url: str) -> Iterator[KeyStore]:
    engine = connect(database_url)
    yield KeyStore(engine, load_pepper(tmp_path))
    engine.dispose()


def test_a_key_is_stored_as_a_hash_and_checked_whole(keys: KeyStore, tmp_path: Path) -> None:
    token = keys.create("alice", tenant="acme", budget_nanousd=5, budget_window="day")
    principal = keys.authenticate(token)
    assert (principal.key_name, principal.tenant, principal.role, principal.budget_nanousd) == (
        "alice",
        "acme",
        "user",
        5,
    )
    for wrong in (
        token[:-1],
        token + "x",
        token.upper(),
        token[:25],
        "",
        "sk-ll-",
        "sk-other",
        f"sk-ll-{principal.key_id}-",
    ):
        with pytest.raises(Unauthenticated) as caught:
            keys.authenticate(wrong)
        assert len(wrong) < 8 or wrong not in caught.value.message
    with keys._engine.connect() as connection:
        stored = str(connection.exec_driver_sql("SELECT * FROM api_key").all())
    assert token.rpartition("-")[2] not in stored


def test_a_revoked_key_ends_and_gives_its_name_back(keys: KeyStore) -> None:
    old = keys.create("bob")
    with pytest.raises(KeyNameError, match="bob"):
        keys.create("bob")
    bob = keys.authenticate(old)
    assert keys.still(bob) == bob
    assert keys.revoke(bob.key_id)
    with pytest.raises(Unauthenticated):
        keys.authenticate(old)
    with pytest.raises(Unauthenticated):
        keys.still(bob)
    assert keys.authenticate(keys.create("bob")).key_name == "bob"
    keys.reload()
    assert [p.key_name for p in keys.all()] == ["bob"]
    assert not keys.revoke("nobody")


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "<script>", "-x"])
def test_a_key_name_that_cannot_be_used_says_why(keys: KeyStore, name: str) -> None:
    with pytest.raises(KeyNameError, match="name"):
        keys.create(name)


@anyio
async def test_a_key_beyond_its_rate_is_told_when_to_come_back(start_gateway: StartGateway) -> None:
    async with start_gateway('limits: [{key: "*", rate: 2/min}]') as gateway:
        statuses = [(await gateway.chat(ask(f"{i}")))[0] for i in range(2)]
        status, headers, body = await gateway.chat(ask("more"))
        rows = await gateway.rows()
    assert statuses == [200, 200], "a window's count may come at once"
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (429, "rate_limit_exceeded", "true")
    assert "key first" in body["error"]["message"]
    assert int(headers["retry-after"]) >= 1
    assert len(rows) == statuses.count(200), "what was not admitted has no row"


def test_windows_start_on_the_calendar() -> None:
    now = int(dt.datetime(2026, 11, 21, 13, 45, 30, tzinfo=dt.UTC).timestamp() * 1000)
    windows: tuple[Window, ...] = ("hour", "day", "week", "month")
    starts = {w: dt.datetime.fromtimestamp(window_start_ms(w, now) / 1000, dt.UTC) for w in windows}
    assert starts == {
        "hour": dt.datetime(2026, 11, 21, 13, tzinfo=dt.UTC),
        "day": dt.datetime(2026, 11, 21, tzinfo=dt.UTC),
        "week": dt.datetime(2026, 11, 16, tzinfo=dt.UTC),
        "month": dt.datetime(2026, 11, 1, tzinfo=dt.UTC),
    }
    assert window_start_ms("total", now) == 0


@given(st.integers(0, 100), st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1), st.booleans()), max_size=40))
def test_reserved_plus_spent_never_exceeds_a_limit(limit: int, calls: list[tuple[int, float, bool]]) -> None:
    budget = Budget("key:k", limit, "total", 0, 0)
    running: list[tuple[Hold, int]] = []
    for worst, share, settle_one in calls:
        try:
            running.append((reserve((budget,), worst), int(worst * share)))
        except BudgetExceeded:
            assert worst > budget.remaining_nanousd, "refused although it fitted"
        if settle_one and running:
            hold, cost = running.pop(0)
            hold.settle(cost)
        assert budget.spent_nanousd + budget.reserved_nanousd <= limit
    for hold, cost in running:
        hold.settle(cost)
    assert budget.reserved_nanousd == 0


@anyio
async def test_racing_calls_never_overspend_a_budget(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    async with start_gateway('limits: [{key: "*", budget: $0.0006/month}]') as gateway:
        calls = [gateway.chat(ask(f"{i}", max_tokens=100)) for i in range(64)]
        answers = await asyncio.gather(*calls)
        rows = await gateway.rows()
        (budget,) = gateway.app.state.lifecycle.budgets.all()
    served = [a for a in answers if a[0] == 200]
    refused = [a for a in answers if a[0] == 429]
    assert served
    assert refused
    assert len(served) + len(refused) == 64
    assert all(a[2]["error"]["type"] == "budget_exceeded" and a[1]["x-should-retry"] == "false" for a in refused)
    spent = sum(bill.nanousd for bill in upstream.truth)
    assert spent == budget.spent_nanousd <= 600_000
    assert budget.reserved_nanousd == 0
    assert len(rows) == 64
    assert {row["outcome"] for row in rows} == {"ok", "refused"}


@anyio
async def test_spend_survives_a_restart(start_gateway: StartGateway, tmp_path: Path) -> None:
    limits = 'limits: [{key: "*", budget: $0.0003/month}]'
    async with start_gateway(limits) as gateway:
        assert (await gateway.chat(ask(max_tokens=10)))[0] == 200
        first = await gateway.chat(ask("and more of it", max_tokens=10))
        remaining = int(first[1]["x-leadline-budget-remaining-nanousd"])
    async with start_gateway(limits) as gateway:
        status, _, _ = await gateway.chat(ask("third", max_tokens=1000))
        assert status == 429
        (budget,) = gateway.app.state.lifecycle.budgets.all()
        assert budget.remaining_nanousd == remaining < 300_000


@anyio
async def test_a_spent_budget_leaves_the_free_model_open(start_gateway: StartGateway) -> None:
    async with start_gateway('limits: [{key: "*", budget: $0.000001/day}]') as gateway:
        status, _, body = await gateway.chat(ask())
        assert (status, body["error"]["type"]) == (429, "budget_exceeded")
        assert body["error"]["message"].startswith("Budget of key:first ($0.000001/day): no model can run this; ")
        assert "Lower max_tokens, choose a cheaper model, or raise the budget." in body["error"]["message"]
        status, headers, _ = await gateway.chat(ask(model="free"))
        assert (status, headers["x-leadline-cost-nanousd"]) == (200, "0")


@anyio
async def test_a_scope_has_its_own_budget(gateway: Gateway) -> None:
    scope = {"X-Leadline-Scope": "run-1", "X-Leadline-Scope-Budget": "0.0003"}
    statuses = [(await gateway.chat(ask(f"{i}", max_tokens=100), **scope))[0] for i in range(20)]
    assert statuses[0] == 200
    assert statuses[-1] == 429
    assert (await gateway.chat(ask("outside the scope")))[0] == 200
    async with gateway.session.get(f"{gateway.url}/leadline/v1/spend", headers=gateway.headers()) as response:
        assert (await response.json())["requests"] == 21


@anyio
async def test_sub_runs_spend_the_budget_of_their_root(gateway: Gateway) -> None:
    root = {"X-Leadline-Scope": "Run", "X-Leadline-Scope-Budget": "0.0003"}
    assert (await gateway.chat(ask("root", max_tokens=100), **root))[0] == 200
    paths = [f"Run/agent-{i}/fetch" for i in range(3)] * 10
    answers = [await gateway.chat(ask(f"{i}", max_tokens=100), **{"X-Leadline-Scope": p}) for i, p in enumerate(paths)]
    assert [answers[0][0], answers[-1][0]] == [200, 429]
    assert answers[0][1]["x-leadline-budget-scope"] == "run:Run"
    assert answers[-1][2]["error"]["type"] == "budget_exceeded"
    other = {"X-Leadline-Scope": "run/agent-0", "X-Leadline-Scope-Budget": "0.0005"}
    assert (await gateway.chat(ask("other", max_tokens=100), **other))[0] == 200, "names differ by case"
    rows = await gateway.rows()
    spent = {
        name: sum(r["cost_nanousd"] for r in rows if (r["scope"] or "").startswith(name)) for name in ("Run", "run")
    }
    for scope in ("Run", "run"):
        async with gateway.session.get(
            f"{gateway.url}/leadline/v1/spend", params={"scope": scope}, headers=gateway.headers()
        ) as response:
            assert (await response.json())["cost_nanousd"] == spent[scope] <= 300_000


@anyio
async def test_keys_made_or_revoked_by_another_process_are_known_at_once(gateway: Gateway) -> None:
    settings = gateway.app.settings
    other = KeyStore(connect(settings.database_url), load_pepper(settings.home))
    token = other.create("late")
    assert (await gateway.chat(ask(), Authorization=f"Bearer {token}"))[0] == 200
    other.revoke(other.authenticate(token).key_id)
    served = gateway.app.state.lifecycle.keys
    await until(lambda: all(principal.key_name != "late" for principal in served.all()))
    assert (await gateway.chat(ask(), Authorization=f"Bearer {token}"))[0] == 401
    other._engine.dispose()
