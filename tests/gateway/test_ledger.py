"""Truth × ledger × transcript: the upstream's books, ours, and what the client was told agree to the nano-dollar."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import SQLModel

from gateway.ids import new_ledger_id
from gateway.ledger import browse, report
from gateway.ledger.journal import Journal, JournalError
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import Usage, WireUsage, cost_nanousd, worst_case_usage
from gateway.ledger.store import LedgerStore, connect
from gateway.ledger.tables import AttemptRow, RequestRow
from routers.policy import Price
from tests.conftest import free_port, wait_for_port
from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import POLICY, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream

TOKENS = st.integers(0, 10**7)
PRICE = st.builds(Price, *[st.integers(0, 10**11)] * 5)


@pytest.mark.anyio
async def test_books_agree_on_both_databases(
    start_gateway: StartGateway, upstream: FakeUpstream, database_url: str
) -> None:
    upstream.faults = [None, fake.status(500), None, None, fake.reset] + [None] * 60
    transcript: Counter[int] = Counter()
    async with start_gateway(database_url=database_url) as gateway:

        async def one(i: int) -> None:
            body = ask(f"question {i} " + "word " * (i % 7), model=("cheap", "dear", "auto")[i % 3], n=1 + i % 2)
            if i % 4 == 0:
                _, _, raw = await gateway.stream({**body, "stream_options": {"include_usage": True}})
                events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
                transcript[events[-1]["leadline"]["cost_nanousd"]] += 1
            else:
                _, headers, _ = await gateway.chat(body)
                transcript[int(headers["x-leadline-cost-nanousd"])] += 1

        await asyncio.gather(*[one(i) for i in range(40)])
        rows = await gateway.rows()
        async with gateway.session.get(f"{gateway.url}/leadline/v1/spend", headers=gateway.headers()) as response:
            spend = await response.json()
    assert len(rows) == 40
    assert Counter(row["cost_nanousd"] for row in rows) == transcript
    assert Counter(bill.nanousd for bill in upstream.truth) == Counter(
        a["cost_nanousd"] for row in rows for a in row["attempt_rows"] if a["outcome"] == "ok"
    )
    assert sum(len(row["attempt_rows"]) for row in rows) == len(upstream.bodies)
    # A connection reset after the request was sent may have been billed: it is an estimate on top, and says so.
    estimated = [a for row in rows for a in row["attempt_rows"] if a["cost_estimated"]]
    assert [a["outcome"] for a in estimated] == ["cut"]
    exact = spend["cost_nanousd"] - sum(a["cost_nanousd"] for a in estimated)
    assert exact == sum(bill.nanousd for bill in upstream.truth)
    assert spend["estimated"] == 1
    assert all(row["overhead_us"] >= 0 and row["duration_us"] > 0 for row in rows)


@pytest.mark.anyio
async def test_an_upstreams_words_cannot_stop_the_ledger(
    start_gateway: StartGateway, upstream: FakeUpstream, database_url: str
) -> None:
    async def refuse(upstream: FakeUpstream, request: web.Request, body: dict[str, object]) -> web.Response:
        return web.json_response({"error": {"message": "nul \x00 in it", "code": "x" * 500}}, status=400)

    upstream.faults = [refuse]
    async with start_gateway(database_url=database_url) as gateway:
        assert (await gateway.chat(ask(), **{"X-Session-Id": "s" * 500}))[0] == 400
        (row,) = await gateway.rows()
    assert row["attempt_rows"][0]["error"] == "fake answered 400: […]"  # its words are its caller's alone


@pytest.mark.anyio
async def test_streamed_costs_what_unstreamed_costs(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        _, headers, _ = await gateway.chat(ask(model="uncached"))
        await gateway.stream(ask(model="uncached"))
        streamed, plain = await gateway.rows()
    assert plain["cost_nanousd"] == streamed["cost_nanousd"] == int(headers["x-leadline-cost-nanousd"]) > 0
    for column in ("input_tokens", "cached_input_tokens", "output_tokens"):
        assert plain[column] == streamed[column]


@pytest.mark.anyio
async def test_a_caller_who_leaves_frees_the_upstream_and_is_billed_what_it_got(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.words, upstream.pace_s = 500, 0.01
    async with start_gateway() as gateway:
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions", json=ask(stream=True), headers=gateway.headers()
        ) as response:
            await response.content.readany()
            await response.content.readany()
            response.close()
        await until(lambda: upstream.closed_early)
        (row,) = await gateway.rows()
        assert gateway.app.state.lifecycle.metrics.in_flight.value == 0
    assert upstream.open_streams == 0
    assert (row["outcome"], row["http_status"], row["cost_estimated"]) == ("cancelled", 499, True)
    (attempt,) = row["attempt_rows"]
    assert attempt["outcome"] == "cancelled"
    assert 2 <= attempt["output_tokens"] < 500


@pytest.mark.anyio
async def test_a_caller_who_leaves_a_plain_call_frees_the_upstream(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.faults = [fake.silence]
    async with start_gateway() as gateway:
        calling = asyncio.create_task(gateway.chat(ask()))
        await until(lambda: upstream.bodies)
        calling.cancel()
        await until(lambda: not gateway.app.state.lifecycle.metrics.in_flight.value)
        (row,) = await gateway.rows()
    assert (row["outcome"], row["cost_estimated"]) == ("cancelled", True)


@given(PRICE, st.builds(Usage, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS))
def test_cost_is_the_exact_sum_rounded_once(price: Price, usage: Usage) -> None:
    exact = (
        usage.input * price.input
        + usage.cached_input * price.cached_input
        + usage.cache_write * price.cache_write
        + usage.output * price.output
        + usage.reasoning * price.reasoning
    )
    assert abs(cost_nanousd(price, usage) * 10**6 - exact) <= 500_000


@given(st.integers(-5, 100), st.integers(-5, 200), st.integers(-5, 200), st.integers(-5, 100), st.integers(-5, 200))
def test_usage_classes_are_disjoint_whatever_a_provider_reports(
    prompt: int, cached: int, written: int, completion: int, reasoning: int
) -> None:
    document = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached, "created_cache_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    usage = msgspec.convert(document, WireUsage).split()
    if usage is None:
        assert min(prompt, completion) < 0 or prompt == completion == 0, "no call has these tokens"
        return
    assert usage.input + usage.cached_input + usage.cache_write == prompt
    assert usage.output + usage.reasoning == completion
    assert min(usage.input, usage.cached_input, usage.cache_write, usage.output, usage.reasoning) >= 0


@given(PRICE, st.integers(1, 10**5), st.integers(1, 10**4), st.integers(1, 4), st.data())
def test_no_usage_within_its_bounds_costs_more_than_the_reservation(
    price: Price, body_bytes: int, max_output: int, choices: int, data: st.DataObject
) -> None:
    price = Price(price.input, min(price.cached_input, price.input), price.cache_write, price.output, price.reasoning)
    prompt = data.draw(st.integers(0, body_bytes))
    cached = data.draw(st.integers(0, prompt))
    written = data.draw(st.integers(0, prompt - cached))
    output = data.draw(st.integers(0, max_output * choices))
    reasoning = data.draw(st.integers(0, output))
    worst = worst_case_usage(
        price, body_bytes=body_bytes, context=10**6, max_output=max_output, choices=choices, text_only=True
    )
    actual = Usage(prompt - cached - written, cached, written, output - reasoning, reasoning)
    assert cost_nanousd(price, actual) <= cost_nanousd(price, worst)


@pytest.mark.parametrize(("record", "table"), [(RequestRecord, RequestRow), (AttemptRecord, AttemptRow)])
def test_records_have_the_columns_of_their_tables(record: type, table: type[SQLModel]) -> None:
    assert set(record.__struct_fields__) == set(table.__table__.columns.keys())  # type: ignore[attr-defined]


def a_request(number: int) -> RequestRecord:
    return RequestRecord(f"req_{number}", 1000 + number, "t", "k", "chat.completions", False, "cheap")


def an_attempt(number: int, cost: int) -> AttemptRecord:
    attempt = AttemptRecord(f"req_{number}-0", f"req_{number}", 0, "cheap", "fake", 1000)
    attempt.bill(Usage(input=5, estimated=True), cost)
    return attempt


def test_ids_sort_in_the_order_in_which_they_were_made() -> None:
    ids = [new_ledger_id(now_ms) for now_ms in (1_795_000_000_000, 1_795_000_000_000 + 1) for _ in range(5_000)]
    assert ids == sorted(set(ids))
    assert {len(one) for one in ids} == {31}


def test_the_journal_gives_back_what_a_crash_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.opened(a_request(1))
    journal.closed(a_request(1), [])
    journal.opened(a_request(2))
    journal.dispatched(an_attempt(2, 77))
    journal.opened(a_request(3))
    os.close(journal._lock_fd)  # as a crash does: nothing is closed, nothing committed
    rows = {request.id: (request, attempts) for request, attempts in Journal(tmp_path / "journal").recover()}
    assert set(rows) == {"req_1", "req_2", "req_3"}
    cut, attempts = rows["req_2"]
    assert (cut.outcome, cut.cost_nanousd, cut.cost_estimated, attempts[0].outcome) == (
        "interrupted",
        77,
        True,
        "interrupted",
    )
    assert (rows["req_3"][0].outcome, rows["req_3"][0].cost_nanousd) == ("interrupted", 0)


@given(st.data())
def test_a_torn_journal_loses_at_most_its_last_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    journal = Journal(folder)
    for number in range(4):
        journal.opened(a_request(number))
    size = journal._current.size
    path = journal._current.path
    os.close(journal._lock_fd)
    keep = data.draw(st.integers(0, size))
    with path.open("r+b") as file:
        file.truncate(keep)
    left = Journal(folder).recover()
    assert [request.id for request, _ in left] == [f"req_{n}" for n in range(len(left))]
    assert len(left) >= keep * 4 // size - 1


def test_journal_segments_go_when_sql_has_all_of_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", segment_bytes=400)
    for number in range(20):
        journal.opened(a_request(number))
        journal.closed(a_request(number), [])
    files = len(list((tmp_path / "journal").glob("journal-*")))
    assert files > 3
    journal.committed([f"req_{n}" for n in range(1, 20)])
    assert len(list((tmp_path / "journal").glob("journal-*"))) == files, "the oldest request is not in SQL yet"
    journal.committed(["req_0"])
    assert len(list((tmp_path / "journal").glob("journal-*"))) == 1
    journal.close()
    assert list((tmp_path / "journal").glob("journal-*")) == []


def test_two_gateways_cannot_share_a_state_folder(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalError, match="LEADLINE_HOME"):
        Journal(tmp_path / "journal")
    journal.close()


@pytest.mark.anyio
async def test_replaying_twice_changes_nothing(tmp_path: Path, database_url: str) -> None:
    journal = Journal(tmp_path / "journal")
    journal.opened(a_request(1))
    journal.dispatched(an_attempt(1, 9))
    os.close(journal._lock_fd)
    copy = {path.name: path.read_bytes() for path in (tmp_path / "journal").glob("journal-*")}
    engine = connect(database_url)
    for _ in range(2):
        for name, content in copy.items():
            (tmp_path / "journal" / name).write_bytes(content)
        store = LedgerStore(engine, Journal(tmp_path / "journal"))
        assert store.replay() == 1
        store.journal.close()
        assert report.summary(engine, since_ms=0)["cost_nanousd"] == 9
        assert len(browse.page(engine, browse.Slice(), limit=10)) == 1
    engine.dispose()


@pytest.mark.anyio
async def test_kill_9_loses_no_row_that_a_caller_was_told_of(upstream: FakeUpstream, tmp_path: Path) -> None:
    """A real gateway process, killed with answers given and calls in flight; the next start closes the books."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(url=upstream.url, limits=""))
    home, port = tmp_path / "home", free_port()
    env = {**os.environ, "LEADLINE_HOME": str(home)}
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--policy", str(policy)]

    def start() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(port, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveness", timeout=30):
            return process

    process = await asyncio.to_thread(start)
    told: dict[str, int] = {}
    async with aiohttp.ClientSession() as session:

        async def call(i: int) -> None:
            headers = {"Authorization": f"Bearer {(home / 'key').read_text()}"}
            body = ask(f"q {i}", model="uncached", stream=i % 2 == 0)
            async with session.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=headers
            ) as response:
                await response.read()
                told[response.headers["x-request-id"]] = 1

        await asyncio.gather(*[call(i) for i in range(20)])
        upstream.faults = [fake.silence] * 3
        hanging = [asyncio.create_task(call(100 + i)) for i in range(3)]
        await until(lambda: not upstream.faults)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        await asyncio.gather(*hanging, return_exceptions=True)
    again = await asyncio.to_thread(start)
    again.terminate()
    await asyncio.to_thread(again.wait)
    engine = connect(f"sqlite:///{home / 'ledger.db'}")
    rows = browse.page(engine, browse.Slice(), limit=100)
    engine.dispose()
    assert Counter(row["outcome"] for row in rows) == {"ok": 20, "interrupted": 3}
    assert set(told) == {row["id"] for row in rows if row["outcome"] == "ok"}
    paid = sum(row["cost_nanousd"] for row in rows if row["outcome"] == "ok")
    assert paid == sum(bill.nanousd for bill in upstream.truth)
    assert all(row["cost_estimated"] and row["cost_nanousd"] > 0 for row in rows if row["outcome"] == "interrupted")
