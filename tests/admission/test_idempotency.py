"""Idempotency keys: one run, one bill, one answer, however often and wherever the request is repeated."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import Engine, insert, text

from gateway.admission import idempotency
from gateway.admission.idempotency import Claim, IdempotencyStore, Replay
from gateway.errors import Conflict, IdempotencyMismatch, OutcomeUnknown
from gateway.ledger.store import connect
from gateway.ledger.tables import RequestRow
from gateway.settings import Settings
from tests.conftest import Size, free_port
from tests.gateway.conftest import POLICY, Gateway, StartGateway, ask, until
from tests.gateway.fake_upstream import FakeUpstream, cut_stream, status

pytestmark = pytest.mark.anyio

PEPPER = b"p" * 32
KEYS, SOAK_KEYS = 60, 1000


@pytest.fixture
def url(database_url: str) -> str:
    return Settings.from_env({"DATABASE_URL": database_url}).database_url


@pytest.fixture
async def open_store(url: str) -> AsyncIterator[Callable[..., IdempotencyStore]]:
    """Another process's store on the same database, each time it is called."""
    engines: list[Engine] = []

    def open_(**options: Any) -> IdempotencyStore:
        engines.append(connect(url))
        return IdempotencyStore(engines[-1], PEPPER, **options)

    yield open_
    for engine in engines:
        engine.dispose()


async def claim(store: IdempotencyStore, request_id: str, body: bytes = b"{}", key_id: str = "k") -> Claim | Replay:
    return await store.claim(key_id, "once", path="/v1/chat/completions", body=body, request_id=request_id)


async def test_of_racing_workers_one_runs_and_the_others_get_its_answer(
    open_store: Callable[..., IdempotencyStore],
) -> None:
    stores = [open_store() for _ in range(3)]
    answers = await asyncio.gather(*(claim(stores[i % 3], f"req_{i}") for i in range(24)), return_exceptions=True)
    (won,) = [answer for answer in answers if isinstance(answer, Claim)]
    assert all(isinstance(answer, Conflict) for answer in answers if answer is not won)
    with pytest.raises(IdempotencyMismatch):
        await claim(stores[0], "req_other", body=b"{ }")
    assert isinstance(await claim(stores[1], "req_another_key", key_id="k2"), Claim), "keys are scoped by API key"
    await stores[0].finish(won, 200, "application/json", b"answer")
    assert await claim(stores[2], "req_late") == Replay(won.request_id, 200, "application/json", b"answer")
    with pytest.raises(IdempotencyMismatch):
        await stores[1].claim("k", "once", path="/v1/embeddings", body=b"{}", request_id="req_x")


async def test_a_released_claim_is_free_and_an_old_one_as_well(
    open_store: Callable[..., IdempotencyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(lease_s=0.15)  # purged as often as leases are renewed
    first = await claim(store, "req_1")
    assert isinstance(first, Claim)
    await store.release(first)
    monkeypatch.setattr(idempotency, "KEEP_S", 0.0)
    second = await claim(store, "req_2", body=b"another")
    assert isinstance(second, Claim)
    await store.finish(second, 200, "application/json", b"old")
    await asyncio.sleep(0.01)
    third = await claim(store, "req_3", body=b"a third")
    assert isinstance(third, Claim)
    await store.finish(first, 200, "application/json", b"late")  # touches no later claim
    with store._engine.connect() as connection:
        assert connection.execute(text("SELECT request_id, status FROM idempotency")).all() == [("req_3", None)]
    store.start()

    def rows() -> int:
        with store._engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM idempotency")).scalar_one())

    await until(lambda: rows() == 0)
    await store.close()


async def test_a_dead_workers_claim_runs_again_only_when_the_ledger_says_it_was_interrupted(
    open_store: Callable[..., IdempotencyStore],
) -> None:
    dead, alive = open_store(), open_store()
    assert isinstance(await claim(dead, "req_1"), Claim)
    with pytest.raises(Conflict, match="under way"):
        await claim(alive, "req_2")
    await asyncio.to_thread(set_leases, alive._engine, 0)
    with pytest.raises(OutcomeUnknown, match="req_1"):
        await claim(alive, "req_2")

    def close_row(outcome: str) -> None:
        row = RequestRow(
            id="req_1", created_at_ms=1, tenant="t", key_id="k", endpoint="chat.completions", stream=False,
            model_requested="m", outcome=outcome, http_status=200,
        )  # fmt: skip
        with alive._engine.begin() as connection:
            connection.execute(text("DELETE FROM request"))
            connection.execute(insert(RequestRow).values(row.model_dump()))

    await asyncio.to_thread(close_row, "ok")
    with pytest.raises(OutcomeUnknown, match="req_1"):
        await claim(alive, "req_2")
    await asyncio.to_thread(close_row, "interrupted")
    again = await asyncio.gather(*(claim(alive, f"req_{i}") for i in range(2, 10)), return_exceptions=True)
    assert sum(isinstance(answer, Claim) for answer in again) == 1


async def test_a_living_workers_claim_keeps_its_lease(open_store: Callable[..., IdempotencyStore]) -> None:
    busy, other = open_store(lease_s=6.0), open_store()

    def lease_until_ms() -> int:
        with other._engine.connect() as connection:
            return int(connection.execute(text("SELECT lease_until_ms FROM idempotency")).scalar_one())

    first = await claim(busy, "req_1")
    assert isinstance(first, Claim)
    ends_ms = lease_until_ms()
    busy.start()
    await until(lambda: lease_until_ms() > ends_ms)
    with pytest.raises(Conflict, match="under way"):
        await claim(other, "req_2")
    await busy.finish(first, 200, "application/json", b"x" * 10)
    await busy.close()


async def test_sixty_keys_times_sixteen_repetitions_run_sixty_times(
    start_gateway: StartGateway, upstream: FakeUpstream, size: Size
) -> None:
    keys = size(KEYS, SOAK_KEYS)
    async with start_gateway() as gateway:

        async def insist(key: int) -> tuple[str, str]:
            body = ask(f"question {key}", model="uncached")
            while True:
                send = gateway.stream if key % 2 else gateway.chat
                code, headers, answer = await send(body, **{"Idempotency-Key": f"key {key}"})
                if code == 200:
                    return headers["x-request-id"], json.dumps(answer) if isinstance(answer, dict) else answer.decode()
                assert code == 409, answer
                assert headers["x-should-retry"] == "true"
                await asyncio.sleep(0.05)

        answers = await asyncio.gather(*(insist(key) for key in range(keys) for _ in range(16)))
        per_key = [set(answers[key * 16 : key * 16 + 16]) for key in range(keys)]
        assert all(len(answer) == 1 for answer in per_key), "the same answer and the same receipt each time"
        rows = await gateway.rows()
        assert len(upstream.truth) == keys
        assert Counter(row["id"] for row in rows) == Counter(answer.pop()[0] for answer in per_key)
        assert sum(row["cost_nanousd"] for row in rows) == sum(bill.nanousd for bill in upstream.truth)
        assert {row["idempotency_key"] for row in rows} == {f"key {key}" for key in range(keys)}
        code, headers, answer = await gateway.chat(ask("another question"), **{"Idempotency-Key": "key 1"})
        assert (code, answer["error"]["code"], headers["x-should-retry"]) == (400, "idempotency_mismatch", "false")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_repeated_to_the_byte_and_billed_once(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    body = {**ask(model="uncached"), "stream": stream}
    seen = []
    for _ in range(2):
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.headers(**{"Idempotency-Key": "a"})
        ) as response:
            seen.append((response.status, response.content_type, await response.read()))
            replayed = response.headers.get("x-leadline-idempotent-replay")
    assert seen[0] == seen[1]
    assert seen[0][0] == 200
    assert replayed == "true"
    assert len(upstream.truth) == len(await gateway.rows()) == 1


async def test_a_providers_error_is_repeated_and_a_refusal_is_not(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.faults += [status(500)] * 2
    async with start_gateway('limits: [{key: "*", rate: 4/h}]') as gateway:
        key = {"Idempotency-Key": "broken"}
        first = await gateway.chat(ask(model="uncached"), **key)
        again = await gateway.chat(ask(model="uncached"), **key)
        assert first[0] == again[0] == 502
        assert first[2] == again[2]
        assert again[1]["x-should-retry"] == "false"
        assert len(upstream.bodies) == 2, "two attempts of one request"
        unknown = await gateway.chat(ask(model="no such model"), **{"Idempotency-Key": "typo"})
        mended = await gateway.chat(ask(), **{"Idempotency-Key": "typo"})
        assert (unknown[0], mended[0]) == (404, 200), "what never ran leaves its key free"
        upstream.faults.append(cut_stream)
        streamed = [await gateway.stream(ask(model="uncached"), **{"Idempotency-Key": "cut"}) for _ in range(2)]
        assert streamed[0][2] == streamed[1][2]
        assert b'"error"' in streamed[0][2]
        assert b"[DONE]" not in streamed[1][2]
        limited = await gateway.chat(ask("too fast"), **{"Idempotency-Key": "fast"})
        assert limited[0] == 429
        with gateway.app.state.lifecycle.ledger.engine.connect() as connection:
            kept = connection.execute(text("SELECT idempotency_key, status FROM idempotency ORDER BY 1")).all()
        assert kept == [("broken", 502), ("cut", 200), ("typo", 200)]


async def test_a_caller_who_hangs_up_finds_its_answer_later(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.pace_s = 0.02
    body = ask(model="uncached")
    calling = asyncio.create_task(gateway.stream(body, **{"Idempotency-Key": "impatient"}))
    await until(lambda: upstream.open_streams == 1)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    async def repeated() -> bytes | None:
        code, headers, answer = await gateway.stream(body, **{"Idempotency-Key": "impatient"})
        if code == 409:
            return None
        assert headers["x-leadline-idempotent-replay"] == "true"
        return bytes(answer)

    async with asyncio.timeout(60):
        while (answer := await repeated()) is None:
            await asyncio.sleep(0.05)
    assert b"[DONE]" in answer
    (row,) = await gateway.rows()
    assert (row["outcome"], len(upstream.truth)) == ("ok", 1)


async def test_an_answer_too_large_to_keep_names_its_receipt(
    gateway: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.edge.recorded.MAX_BODY_BYTES", 64)
    for stream in (False, True):
        key = {"Idempotency-Key": f"large {stream}"}
        send = gateway.stream if stream else gateway.chat
        first = await send(ask(model="uncached"), **key)
        code, headers, answer = await send(ask(model="uncached"), **key)
        assert (first[0], code) == (200, 409)
        said = answer["error"] if isinstance(answer, dict) else json.loads(answer)["error"]
        assert said["code"] == "idempotency_unknown"
        assert first[1]["x-request-id"] in said["message"]
        assert headers["x-should-retry"] == "false"
    assert len(upstream.truth) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "ä"])
async def test_a_key_that_cannot_be_used_says_why(gateway: Gateway, key: str) -> None:
    code, _, answer = await gateway.chat(ask(), **{"Idempotency-Key": key})
    assert code == 400
    assert "idempotency-key" in answer["error"]["message"]


async def test_after_a_crash_the_key_waits_for_the_ledger_and_then_runs_again(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(url=upstream.url, limits=""))
    home, port = tmp_path / "home", free_port()
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--policy", str(policy)]
    environment = {"LEADLINE_HOME": str(home), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}

    async def serve() -> subprocess.Popen[bytes]:
        process = await asyncio.to_thread(subprocess.Popen, command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                async with session.get(f"http://127.0.0.1:{port}/health/liveness") as response:
                    assert response.status == 200
                    return process
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
        raise TimeoutError("the gateway did not start")

    async def call() -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {(home / 'key').read_text()}", "Idempotency-Key": "crash"}
        body = ask(model="uncached", stream=True)
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=headers) as response:
            return response.status, await response.read()

    upstream.pace_s = 3.0
    async with aiohttp.ClientSession() as session:
        process = await serve()
        calling = asyncio.create_task(call())
        await until(lambda: len(upstream.bodies) == 1)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        await asyncio.gather(calling, return_exceptions=True)
        upstream.pace_s = 0.0
        await asyncio.to_thread(lease_until, home, time.time_ns() // 1_000_000 + 600_000)  # however long a start takes
        process = await serve()
        try:
            code, answer = await call()
            assert code == 409, answer  # its lease stands for a while
            await asyncio.to_thread(lease_until, home, 0)
            code, answer = await call()
            assert code == 200, answer
            assert b"[DONE]" in answer
            assert (await call()) == (200, answer)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)
    assert len(upstream.bodies) == 2
    engine = connect(f"sqlite:///{home / 'ledger.db'}")
    with engine.connect() as connection:
        outcomes = connection.execute(text("SELECT outcome FROM request ORDER BY created_at_ms")).scalars().all()
    engine.dispose()
    assert outcomes == ["interrupted", "ok"], "the first is billed as an estimate, the second as it was"


def lease_until(home: Path, end_ms: int) -> None:
    engine = connect(f"sqlite:///{home / 'ledger.db'}")
    set_leases(engine, end_ms)
    engine.dispose()


def set_leases(engine: Engine, end_ms: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE idempotency SET lease_until_ms = :end"), {"end": end_ms})
