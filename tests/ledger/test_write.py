"""The writer thread's own way into SQL: the same rows on both databases, whatever the words and however often."""

from pathlib import Path

import pytest
from sqlalchemy import Engine

from gateway.ledger import browse, report
from gateway.ledger.journal import Journal
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import Usage
from gateway.ledger.store import LedgerStore, connect
from gateway.settings import Settings, SettingsError
from tests.gateway.test_ledger import a_request

anyio = pytest.mark.anyio


def full_request(number: int) -> tuple[RequestRecord, list[AttemptRecord]]:
    """A request with something in every column."""
    request = RequestRecord(
        id=f"req_{number}", created_at_ms=1_795_200_000_000, tenant="t", key_id="k", endpoint="chat.completions",
        stream=True, model_requested="gpt – \N{SNOWMAN} \\ \" '", session="s", scope="a/b", model_served="m",
        provider="p", route="r", policy_version="abc", decision='{"why": "\\u0000 and \\n"}', outcome="ok",
        http_status=200, error_code=None, cache="miss", baseline_nanousd=2**60, reserved_nanousd=2**61,
        first_byte_us=1, duration_us=2, overhead_us=3, team="core", degraded="cheaper", idempotency_key="once",
        trace_id="0af7651916cd43dd8448eb211c80319c",
    )  # fmt: skip
    attempts = []
    for seq, kind in enumerate(("first", "retry", "fallback", "hedge", "resume")):
        attempt = AttemptRecord(f"req_{number}-{seq}", request.id, seq, "m", "p", 1_795_200_000_001)
        attempt.bill(Usage(1, 2, 3, 4, 5, estimated=seq == 1), None if seq == 4 else seq)
        attempt.outcome, attempt.kind, attempt.error = "ok", kind, None if seq else 'tab\tquote"'  # type: ignore[assignment]
        attempts.append(attempt)
    request.total(attempts)
    return request, attempts


def as_read(engine: Engine, request_id: str) -> tuple[dict[str, object], list[dict[str, object]]]:
    found = report.request(engine, request_id)
    assert found is not None
    return found


def test_every_column_comes_back_as_it_went_in(tmp_path: Path, database_url: str) -> None:
    engine = connect(database_url)
    store = LedgerStore(engine, Journal(tmp_path / "journal" / "0"))
    request, attempts = full_request(1)
    for _ in range(2):  # a second time changes nothing
        store._writer.insert([(request, attempts)])
    row, tried = as_read(engine, "req_1")
    assert row == {name: getattr(request, name) for name in RequestRecord.__struct_fields__}
    assert tried == [{name: getattr(a, name) for name in AttemptRecord.__struct_fields__} for a in attempts]
    request.outcome = "changed"
    store._writer.insert([(request, attempts), (a_request(2), [])])
    assert as_read(engine, "req_1")[0]["outcome"] == "ok"
    assert as_read(engine, "req_2")[1] == []
    store.journal.close()
    engine.dispose()


@anyio
async def test_a_text_that_is_too_long_or_holds_nul_costs_no_row(tmp_path: Path, database_url: str) -> None:
    engine = connect(database_url)
    store = LedgerStore(engine, Journal(tmp_path / "journal" / "0"))
    store.start()
    for number, text in enumerate(("m" * 5000, "nul \x00", "plain")):
        request = a_request(number)
        request.model_requested = request.tenant = text
        store.journal.opened(request)
        store.close_request(request, [])
    await store.flush(timeout_s=20)
    rows = {row["id"]: row for row in browse.page(engine, browse.Slice(), limit=10)}
    assert rows["req_0"]["model_requested"].startswith("m" * 256)
    assert rows["req_0"]["tenant"].startswith("m" * 64)
    assert rows["req_1"]["tenant"] == "nul \N{REPLACEMENT CHARACTER}"
    assert rows["req_2"]["tenant"] == "plain"
    await store.stop()
    engine.dispose()


@anyio
async def test_a_database_that_drops_its_connections_gets_every_row(tmp_path: Path, postgres_url: str) -> None:
    engine = connect(Settings.from_env({"DATABASE_URL": postgres_url}).database_url)
    store = LedgerStore(engine, Journal(tmp_path / "journal" / "0"))
    store.start()
    for number in range(3):
        request = a_request(number)
        store.journal.opened(request)
        store.close_request(request, [])
        await store.flush(timeout_s=20)
        other = connect(Settings.from_env({"DATABASE_URL": postgres_url}).database_url)
        with other.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        other.dispose()
    assert report.summary(engine, since_ms=0)["requests"] == 3
    await store.stop()
    engine.dispose()


def test_a_durability_that_is_no_mode_is_named() -> None:
    assert Settings.from_env({}).durability == "process"
    with pytest.raises(SettingsError, match="LEADLINE_DURABILITY: 'fast' is no mode; use process"):
        Settings.from_env({"LEADLINE_DURABILITY": "fast"})
