"""The gateway of tests/gateway, for the tests of admission."""

import pytest

from gateway.admission import shared_budgets
from tests.gateway.conftest import gateway, start_gateway, upstream

__all__ = ["gateway", "start_gateway", "upstream"]


@pytest.fixture(autouse=True)
def database_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no database that is away; a test of one that is asks for `hasty`."""
    monkeypatch.setattr(shared_budgets, "WAIT_S", 30.0)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, database_may_be_slow: None) -> None:
    """Whoever waits for the database is soon refused."""
    monkeypatch.setattr(shared_budgets, "WAIT_S", 2.0)
