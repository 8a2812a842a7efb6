"""T8 on the local engine: a caller who leaves frees its sequence and its cache, running or still in the queue."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.server import serve
from local_engine.turns import Turn
from tests.faults.books import join
from tests.faults.load import chat_request
from tests.faults.test_disconnect import LEAVERS, MAX_S, Reached, deltas, leave
from tests.gateway.conftest import running, until

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

POLICY = """
version: 1
providers:
  home: {engine: embedded}
models:
  local: {provider: home, model: bundled/base, context: 1024, price: {input: $1/Mtok, output: $1/Mtok}}
limits: [{key: "*", budget: $1000/month}]
"""
RUNNING = 4
"""Sequences at a time; the other leavers wait in the engine's queue."""
QUESTION = "What is 91 + 82 - 73 + 64 - 55 + 46 - 37 + 28 - 19 + 12 - 7 + 5?"
PHASES: dict[str, tuple[bool, Reached | None]] = {
    "a whole answer awaited, most of them queued": (False, None),
    "before the first token, most of them queued": (True, None),
    "after the first token": (True, deltas(1)),
    "in the middle": (True, deltas(4)),
}


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """In this process, so that it can be asked what it still holds; on the socket `tmp_path/engine.sock`."""
    engine = Engine({"bundled/base": load_model("bundled/base", "bundled/base")}, None, max_running=RUNNING)
    engine.start()
    serving = asyncio.create_task(serve(engine, str(tmp_path / "engine.sock")))
    await until(lambda: (tmp_path / "engine.sock").exists())
    yield engine
    await asyncio.to_thread(engine.stop)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


@pytest.mark.parametrize("phase", PHASES)
async def test_a_caller_who_leaves_frees_the_engine(phase: str, engine: Engine, tmp_path: Path) -> None:
    stream, reached = PHASES[phase]
    async with running(POLICY, tmp_path / "home", engine=tmp_path / "engine.sock") as gateway:
        link = gateway.app.engine
        assert link is not None
        await until(lambda: link.client is not None)
        lifecycle = gateway.app.state.lifecycle
        in_flight = lifecycle.metrics.in_flight

        def arrived() -> bool:
            stats = engine.stats()
            return reached is not None or stats.running + stats.waiting >= LEAVERS

        async def one(number: int) -> int:
            body: dict[str, Any] = {"model": "local", "messages": [{"role": "user", "content": QUESTION}], "n": 2}
            body |= {"stream": stream, "temperature": 1.0, "seed": number}
            return len(await leave(gateway, chat_request(gateway.key, f"leaver-{number}", body), arrived, reached))

        got = await asyncio.gather(*[one(number) for number in range(LEAVERS)])
        left = time.perf_counter()
        while in_flight.value or (stats := engine.stats()).running or stats.waiting or stats.kv_tokens:
            await asyncio.sleep(0.002)
        waited_s = time.perf_counter() - left
        await lifecycle.ledger.flush(timeout_s=30)
        calls = join([], lifecycle.ledger.engine)
        assert [budget.reserved_nanousd for budget in lifecycle.budgets.all()] == [0]
    print(f"{phase}: engine free after {waited_s * 1000:.0f} ms")  # noqa: T201
    assert waited_s < MAX_S
    assert set(calls) == {f"leaver-{number}" for number in range(LEAVERS)}
    for number, delivered in enumerate(got):
        (attempt,) = calls[f"leaver-{number}"].attempts
        assert attempt["output_tokens"] + attempt["reasoning_tokens"] >= delivered
        held = calls[f"leaver-{number}"].request["reserved_nanousd"]
        assert attempt["cost_nanousd"] <= (held // 4 if attempt["outcome"] == "cancelled" else held), "what was written"
    outcomes = [calls[f"leaver-{number}"].request["outcome"] for number in range(LEAVERS)]
    assert set(outcomes) <= {"cancelled", "ok"}, "a fast answer may be done before its caller leaves"
    assert outcomes.count("cancelled") >= LEAVERS // 2


async def test_an_engine_that_goes_away_is_paid_for_what_it_had_written(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, gone = threading.Event(), threading.Event()
    tell = engine._tell

    def pause(turns: list[Turn]) -> None:
        """In the middle of the answer, until its caller has lost the engine."""
        tell(turns)
        if engine.stats().kv_tokens > 400:
            written.set()
            gone.wait(60)

    monkeypatch.setattr(engine, "_tell", pause)
    policy = POLICY.replace("engine: embedded", "engine: embedded, retries: 0, breaker: off")
    async with running(policy, tmp_path / "home", engine=tmp_path / "engine.sock") as gateway:
        link = gateway.app.engine
        assert link is not None
        await until(lambda: link.client is not None)
        body = {"model": "local", "messages": [{"role": "user", "content": QUESTION}], "n": 4, "temperature": 1.0}
        asking = asyncio.create_task(gateway.chat(body))
        try:
            await until(written.is_set)
            assert link.client is not None
            await link.client.close()
            status, _, _ = await asking
        finally:
            gone.set()
        (row,) = await gateway.rows()
    (attempt,) = row["attempt_rows"]
    assert (status, attempt["outcome"]) == (503, "engine_gone")
    assert attempt["output_tokens"] + attempt["reasoning_tokens"] > 0
    assert 0 < attempt["cost_nanousd"] < row["reserved_nanousd"] / 4
