"""One lone gateway, or several that share, on one database: also after the server forgot who holds it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from gateway.ledger.claim import DatabaseClaim, DatabaseClaimed
from gateway.ledger.store import connect
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.gateway.fake_upstream import FakeUpstream

POLICY = """
version: 1
providers: {{fake: {{base_url: "{url}", timeout: 5s}}}}
models: {{cheap: {{provider: fake, model: cheap, price: free}}}}
"""
ASKED: dict[str, Any] = {"model": "cheap", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def engines(postgres_url: str) -> Iterator[tuple[Engine, Engine]]:
    url = Settings.from_env({"DATABASE_URL": postgres_url}).database_url
    one, other = connect(url), connect(url)
    yield one, other
    one.dispose()
    other.dispose()


def forget(engine: Engine) -> None:
    """As a restart of the server does: every session but this one has ended, and its locks with it, on return."""
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_claim_is_taken_again_when_the_server_forgot_it(engines: tuple[Engine, Engine]) -> None:
    mine, others = engines
    claim = DatabaseClaim(mine, shared=False)
    claim.take()
    forget(others)
    claim.look()  # finds its connection gone
    claim.look()
    assert claim.lost == ""
    with pytest.raises(DatabaseClaimed, match="another gateway is running"):
        DatabaseClaim(others, shared=False).take()
    with pytest.raises(DatabaseClaimed, match="counts its limits alone"):
        DatabaseClaim(others, shared=True).take()
    claim.close()
    after = DatabaseClaim(others, shared=True)
    after.take()
    beside = DatabaseClaim(mine, shared=True)
    beside.take()
    beside.close()
    after.close()


@pytest.mark.anyio
async def test_a_gateway_that_finds_its_database_claimed_admits_nothing_more(
    upstream: FakeUpstream,
    engines: tuple[Engine, Engine],
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "gateway.ledger.claim.LOOK_S", 3600.0
    )  # the test looks; the gateway's own look could come first
    _, others = engines
    async with running(POLICY.format(url=upstream.url), tmp_path / "home", database_url=postgres_url) as gateway:
        assert (await gateway.chat(ASKED))[0] == 200
        claim = gateway.app.state.lifecycle.ledger._claim
        assert claim is not None
        forget(others)
        usurper = DatabaseClaim(others, shared=False)
        usurper.take()
        claim.look()
        claim.look()
        status, headers, body = await gateway.chat({**ASKED, "seed": 1})
        assert (status, "another gateway is running" in body["error"]["message"]) == (503, True)
        assert headers["retry-after"]
        usurper.close()
        claim.look()
        assert (await gateway.chat({**ASKED, "seed": 2}))[0] == 200
