"""T2: healthy traffic of every kind, and not one row or nano-dollar between the upstream's books and ours."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from gateway.ledger import report
from gateway.ledger.store import connect
from tests.conftest import Size
from tests.faults.books import Call, join, tokens_of
from tests.faults.load import Told, chat_request, drive
from tests.faults.serving import serving
from tests.upstream.process import upstream_process
from tests.upstream.truth import Row

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 60s, retries: 0}}
models:
  cheap: {{provider: fake, model: small, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.0755555/Mtok, cache_write: $0.1875/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: fake, model: large, context: 128000, max_output: 4000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, cache_write: $3.125/Mtok, output: $10/Mtok,
                 reasoning: $12.3456789/Mtok}}}}
  tiered: {{provider: fake, model: tiered, context: 128000, max_output: 4000,
           price: {{input: $1.25/Mtok, cached_input: $0.31/Mtok, output: $10/Mtok,
                   tiers: [{{above: 40, input: $2.50/Mtok, cached_input: $0.625/Mtok, output: $15/Mtok}}]}}}}
limits: [{{key: "*", budget: $10000/month}}]
"""
CALLS = 20_000
SOAK_RUNS = 10
"""With --soak 30; a million calls, 50 runs, with --soak 150."""
MODELS = ("cheap", "dear", "tiered")
TOOL = {"type": "function", "function": {"name": "sound", "parameters": {"type": "object"}}}
WORDS = ["how", "deep", "is", "the", "water", "under", "the", "keel", "at", "low", "tide", "here"]


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of pairs: the same question whole and streamed, of all kinds mixed."""
    rng = random.Random(seed)
    bodies = []
    for number in range(count // 2):
        text = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 80)))
        body: dict[str, Any] = {"model": rng.choice(MODELS), "messages": [{"role": "user", "content": text}]}
        if rng.random() < 0.3:
            body["messages"].insert(0, {"role": "system", "content": "Answer as a leadsman would."})
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 3)
        if rng.random() < 0.2:
            body["tools"] = [TOOL]
        if rng.random() < 0.2:
            body["max_tokens"] = rng.randint(1, 8)
        if rng.random() < 0.2:
            body["metadata"] = {"hidden": "1", "reasoning": str(rng.randint(1, 500))}
        bodies += [body, {**body, "stream": True}]
    return bodies


async def run(count: int, folder: Path, database_url: str, seed: int) -> tuple[list[Told], list[Row], Engine]:
    with upstream_process(folder / "truth", seed=seed) as upstream:
        with serving(POLICY.format(url=upstream.url), folder, database_url=database_url) as gateway:
            requests = [
                chat_request(gateway.key, f"call-{number}", body) for number, body in enumerate(questions(count, seed))
            ]
            started = time.perf_counter()
            told = await drive(gateway.port, requests)
            seconds = time.perf_counter() - started
        truth = upstream.rows()
    print(f"{count} calls in {seconds:.1f} s, {count / seconds:.0f}/s")  # noqa: T201
    return told, truth, connect(database_url)


def check(told: list[Told], truth: list[Row], engine: Engine) -> None:
    assert {answer.status for answer in told} == {200}
    calls = join(truth, engine)
    assert set(calls) == {f"call-{number}" for number in range(len(told))}, "a row without its partner"
    for number, answer in enumerate(told):
        check_one(answer, calls[f"call-{number}"])
    for number in range(0, len(told), 2):
        whole, streamed = calls[f"call-{number}"], calls[f"call-{number + 1}"]
        assert not whole.request["stream"]
        assert streamed.request["stream"]
        assert tokens_of(whole.request) == tokens_of(streamed.request)
        assert whole.request["cost_nanousd"] == streamed.request["cost_nanousd"]
    spend = report.summary(engine, since_ms=0)
    assert spend["requests"] == len(told)
    assert spend["cost_nanousd"] == sum(row.nanousd for row in truth)
    assert (spend["estimated"], spend["unpriced"], spend["not_ok"]) == (0, 0, 0)


def check_one(answer: Told, call: Call) -> None:
    (row,), (attempt,), request = call.truth, call.attempts, call.request
    assert request["id"] == answer.request_id
    assert row.phase == "complete"
    assert row.reported
    assert tokens_of(attempt) == tokens_of(request) == row.tokens
    assert attempt["cost_nanousd"] == request["cost_nanousd"] == row.nanousd == answer.cost_nanousd
    assert not request["cost_estimated"]
    assert request["outcome"] == attempt["outcome"] == "ok"
    assert row.nanousd <= request["reserved_nanousd"], "more than was held for it"
    assert answer.body.endswith(b"data: [DONE]\n\n") == request["stream"]


@pytest.mark.timeout(900)
async def test_twenty_thousand_calls_leave_no_nano_dollar_unexplained(tmp_path: Path, size: Size) -> None:
    for seed in range(1, 1 + size(1, SOAK_RUNS)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        told, truth, engine = await run(CALLS, folder, f"sqlite:///{folder / 'ledger.db'}", seed)
        check(told, truth, engine)
        engine.dispose()
        shutil.rmtree(folder)


@pytest.mark.timeout(600)
async def test_two_thousand_calls_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    told, truth, engine = await run(2_000, tmp_path, postgres_url, seed=2)
    check(told, truth, engine)
    engine.dispose()
