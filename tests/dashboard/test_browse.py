"""The dashboard's queries say the same on both databases."""

from collections.abc import Iterator

import msgspec
import pytest
from sqlalchemy import Engine
from sqlmodel import Session

from gateway.dashboard import queries
from gateway.ledger import browse, report
from gateway.ledger.browse import Slice
from gateway.ledger.records import AttemptRecord
from gateway.ledger.settle import Usage
from gateway.ledger.spend import spend_by
from gateway.ledger.store import connect
from gateway.ledger.tables import AttemptRow, RequestRow
from tests.dashboard.conftest import row, seed

HOUR_MS = 3_600_000


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = connect(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with Session(made) as session:
        for request, attempts in seed():
            session.add(RequestRow(**msgspec.structs.asdict(request)))
            session.add_all([AttemptRow(**msgspec.structs.asdict(attempt)) for attempt in attempts])
        session.commit()
    yield made
    made.dispose()


def test_cells_pages_and_choices_agree(engine: Engine) -> None:
    everything = [found for page in browse.pages(engine, Slice(), size=7) for found in page]
    assert len(everything) == len({found["id"] for found in everything}) == len(seed())
    assert [browse.cursor(found) for found in everything] == sorted(map(browse.cursor, everything), reverse=True)
    for span_ms in (HOUR_MS, 24 * HOUR_MS, 10_000 * 24 * HOUR_MS):
        totals = queries.Totals.of(browse.cells(engine, Slice(), span_ms=span_ms))
        assert totals.requests == len(everything)
        assert totals.cost_nanousd == sum(found["cost_nanousd"] or 0 for found in everything)
        assert totals.output_tokens == sum(found["output_tokens"] + found["reasoning_tokens"] for found in everything)
    streamed = [found for found in everything if found["stream"]]
    assert browse.page(engine, Slice(stream=True), limit=100) == streamed
    choices = browse.choices(engine, Slice(tenant="acme"))
    assert choices == {"model": ["large", "small"], "outcome": ["ok"], "tenant": ["acme"]}
    assert browse.oldest_ms(engine, Slice()) == everything[-1]["created_at_ms"]
    assert browse.oldest_ms(engine, Slice(tenant="nobody")) is None


def test_the_overview_of_a_long_ledger_stays_one_screen_wide(engine: Engine) -> None:
    now_ms = seed()[0][0].created_at_ms + 60_000
    view = queries.overview(engine, Slice(), now_ms=now_ms)
    assert view.span == "week"
    assert len(view.spend.columns) <= queries.MAX_COLUMNS + 1
    assert view.spend.total == view.totals.cost_nanousd == sum(share.totals.cost_nanousd for share in view.shares)
    assert view.requests.total == view.totals.requests == sum(share.totals.requests for share in view.shares)


def test_a_row_from_a_clock_ahead_of_ours_is_on_the_chart(engine: Engine) -> None:
    request, _ = row(age_s=-7200)
    with Session(engine) as session:
        session.add(RequestRow(**msgspec.structs.asdict(request)))
        session.commit()
    now_ms = request.created_at_ms - 7_200_000
    view = queries.overview(engine, Slice(since_ms=now_ms - 24 * HOUR_MS), now_ms=now_ms)
    assert view.requests.total == view.totals.requests


@pytest.mark.parametrize("served", ["small", None])
def test_money_stands_where_it_was_spent(engine: Engine, served: str | None) -> None:
    """A paid attempt that failed before another model answered, or before nobody did."""
    before = {at: _spend_by_model(engine, at) for at in ("report", "cells", "admin")}
    request, _ = row(age_s=90)
    attempts = []
    for number, (model, cost) in enumerate([("large", 5_000_000), ("small", 0)][: 2 if served else 1]):
        attempt = AttemptRecord(f"{request.id}-{number}", request.id, number, model, "far", request.created_at_ms)
        attempt.bill(Usage(input=100 + number, output=7), cost)
        attempts.append(attempt)
    request.model_served = served
    request.total(attempts)
    assert request.cost_nanousd == 5_000_000
    with Session(engine) as session:
        session.add(RequestRow(**msgspec.structs.asdict(request)))
        session.add_all([AttemptRow(**msgspec.structs.asdict(attempt)) for attempt in attempts])
        session.commit()
    for at, models in before.items():
        after = _spend_by_model(engine, at)
        requests, cost, tokens = models["large"]
        assert after["large"] == (requests, cost + 5_000_000, None if tokens is None else tokens + 107), at
        requests, cost, tokens = models.get(served, (0, 0, None if at == "report" else 0))
        added = 0 if served is None else 108
        assert after[served] == (requests + 1, cost, None if tokens is None else tokens + added), at
        assert sum(spent[1] for spent in after.values()) == report.summary(engine, since_ms=0)["cost_nanousd"]


def _spend_by_model(engine: Engine, at: str) -> dict[str | None, tuple[int, int, int | None]]:
    """Requests, nano-dollars and tokens (where they are told) per model."""
    if at == "report":
        return {r["model"]: (r["requests"], r["cost_nanousd"], None) for r in report.by_model(engine, since_ms=0)}
    if at == "admin":
        return {
            r["model"]: (r["requests"], r["cost_nanousd"], r["input_tokens"] + r["output_tokens"])
            for r in spend_by(engine, "model", since_ms=0, until_ms=1 << 53, limit=100)
        }
    found = browse.cells(engine, Slice(), span_ms=10**15)
    return {c.model: (c.requests, c.cost_nanousd, c.input_tokens + c.output_tokens) for c in found}
