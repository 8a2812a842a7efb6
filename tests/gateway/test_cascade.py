"""A cascade, end to end: what is accepted is sent, what is not shows nowhere but on the bill, and effort is told."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio

POLICY = (
    fake.TWO_MODELS
    + """\
  brief: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: free, concise: true}}
  plain: {{provider: fake, model: cheap, context: 16000, max_output: 1000, price: free}}
routes:
  - {{name: two, when: {{model: two}}, candidates: ["cheap>dear"], cache: off,
     accept: {{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}}}}
  - {{name: kept, when: {{model: kept}}, candidates: ["cheap>dear"],
     accept: {{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}}}}
  - {{name: more, when: {{model: more}}, candidates: ["cheap+none>cheap+high"], cache: off,
     accept: {{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}}}}
  - {{name: off, when: {{model: off}}, candidates: [cheap+none], cache: off}}
  - {{name: hard, when: {{model: hard}}, candidates: [dear+think], cache: off}}
  - {{name: fixed, when: {{model: fixed}}, candidates: [plain, cheap], effort: low, cache: off, on_failure: [cheap]}}
{limits}
"""
)


@pytest.fixture
async def cascading(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(POLICY.format(url=upstream.url, limits=""), tmp_path / "home") as gateway:
        yield gateway


def sure(p: float) -> fake.Fault:
    """A plain answer whose tokens all have this probability; accepted from 2/3 or so on: ln p >= ln(2/3)."""

    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        answered = await upstream.plain(body)
        assert answered.body is not None
        told = json.loads(answered.body)  # type: ignore[arg-type]
        tokens = [{"token": "w", "logprob": math.log(p), "bytes": None, "top_logprobs": []}] * upstream.words
        told["choices"][0]["logprobs"] = {"content": tokens}
        return web.json_response(told)

    return play


async def told(gateway: Gateway, model: str, *, stream: bool, **fields: Any) -> tuple[Any, str, list[bytes]]:
    """(headers, the model that answered, the words) of one call."""
    if not stream:
        status, headers, body = await gateway.chat(ask(model=model, **fields))
        assert status == 200, body
        return headers, body["model"], [body["choices"][0]["message"]["content"].encode()]
    status, headers, raw = await gateway.stream(ask(model=model, **fields))
    assert status == 200, raw
    assert raw.endswith(b"data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    words = [event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]]
    return headers, events[0]["model"], ["".join(words).encode()]


async def bill(gateway: Gateway, upstream: FakeUpstream) -> list[tuple[str, str, str]]:
    """(model, kind, outcome) of the last request's attempts, whose costs are the upstream's own."""
    row = (await gateway.rows())[0]
    assert row["cost_nanousd"] == sum(bill.nanousd for bill in upstream.truth[-len(row["attempt_rows"]) :])
    return [(attempt["model"], attempt["kind"], attempt["outcome"]) for attempt in row["attempt_rows"]]


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_accepted_answer_is_sent_and_nothing_else_is_asked(
    cascading: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [sure(0.9)]
    headers, model, words = await told(cascading, "two", stream=stream)
    assert (headers["x-leadline-model"], model) == ("cheap", "cheap")
    assert words == [b" ".join(b"w%d" % at for at in range(12))]
    assert await bill(cascading, upstream) == [("cheap", "first", "ok")]
    sent = json.loads(upstream.bodies[0])
    assert sent["logprobs"] is True
    assert not sent.get("stream"), "an answer that is judged comes whole"


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_of_an_answer_that_is_not_accepted_only_the_bill_shows(
    cascading: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [sure(0.3)]
    headers, model, words = await told(cascading, "two", stream=stream)
    assert (headers["x-leadline-model"], model) == ("dear", "dear")
    assert words == [b" ".join(b"w%d" % at for at in range(12))], "said once"
    assert await bill(cascading, upstream) == [("cheap", "first", "not_accepted"), ("dear", "escalation", "ok")]
    assert "logprobs" not in json.loads(upstream.bodies[1]), "the last stage is asked as the caller asked"
    row = (await cascading.rows())[0]
    decision = json.loads(row["decision"])
    assert (decision["plan"]["kind"], [c["model"] for c in decision["candidates"]]) == ("cascade", ["cheap>dear"])
    for model in ("cheap", "dear"):
        await cascading.chat(ask(model=model))
    dear, cheap = [alone["reserved_nanousd"] for alone in (await cascading.rows())[:2]]
    assert dear + cheap * 0.9 < row["reserved_nanousd"] < dear + cheap * 1.1, "all that was held, one after the other"


@anyio
async def test_log_probabilities_come_back_to_those_who_asked(cascading: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [sure(0.9), sure(0.9)]
    _, _, without = await cascading.chat(ask(model="two"))
    _, _, with_them = await cascading.chat(ask(model="two", logprobs=True))
    assert without["choices"][0]["logprobs"] is None
    assert len(with_them["choices"][0]["logprobs"]["content"]) == 12
    assert without["vendor_field"] == {"kept": True}


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_weak_stage_that_fails_or_cannot_be_judged_is_passed_over(
    cascading: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [fake.status(500)]
    headers, *_ = await told(cascading, "two", stream=stream)
    assert headers["x-leadline-model"] == "dear"
    row = (await cascading.rows())[0]
    assert [(a["model"], a["kind"]) for a in row["attempt_rows"]] == [("cheap", "first"), ("dear", "fallback")]
    headers, *_ = await told(cascading, "two", stream=stream)  # an answer without log probabilities
    assert headers["x-leadline-model"] == "dear"
    assert (await bill(cascading, upstream))[0] == ("cheap", "first", "not_accepted")


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "choices", [None, 3, [], ["w"], [{"index": 0, "logprobs": {"content": [{"token": "w", "logprob": 0}]}}]]
)
async def test_a_stage_that_answers_something_else_is_passed_over(
    cascading: Gateway, upstream: FakeUpstream, choices: Any, stream: bool
) -> None:
    async def odd(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        usage = upstream.bill(body, 5)
        return web.json_response({"usage": usage} if choices is None else {"choices": choices, "usage": usage})

    upstream.faults = [odd]
    _, model, _ = await told(cascading, "two", stream=stream)
    assert model == "dear"
    assert await bill(cascading, upstream) == [("cheap", "first", "not_accepted"), ("dear", "escalation", "ok")]


@anyio
async def test_a_stage_that_never_answered_is_billed_at_the_most_however_its_caller_reads(
    cascading: Gateway, upstream: FakeUpstream
) -> None:
    billed = []
    for stream in (False, True):
        upstream.faults = [fake.reset]
        await told(cascading, "two", stream=stream, max_tokens=500)
        lost = (await cascading.rows())[0]["attempt_rows"][0]
        assert (lost["model"], lost["cost_estimated"]) == ("cheap", 1)
        billed.append(lost["cost_nanousd"])
    assert min(billed) >= 500 * 600, "it may have been written whole, which is how a stage is asked"


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_weak_answer_is_better_than_none(cascading: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.faults = [sure(0.3), fake.status(500)]
    headers, model, _ = await told(cascading, "kept", stream=stream)
    assert model == "cheap"
    row = (await cascading.rows())[0]
    assert (row["outcome"], row["degraded"], row["model_served"]) == ("ok", "not_accepted", "cheap")
    if not stream:
        assert (headers["x-leadline-degraded"], headers["x-leadline-model"]) == ("not_accepted", "cheap")
    upstream.faults = [sure(0.9)]
    headers, *_ = await told(cascading, "kept", stream=stream)
    assert headers["x-leadline-cache"] == "miss", "what was not accepted is not kept"
    headers, *_ = await told(cascading, "kept", stream=stream)
    assert headers["x-leadline-cache"] == "hit"


@anyio
async def test_a_cascade_whose_money_went_elsewhere_meanwhile_sends_the_weak_answer(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    asked, held, let_go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def weak(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked.set()
        await held.wait()
        return await sure(0.3)(upstream, request, body)

    async def rival(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        held.set()
        await let_go.wait()
        return await upstream.plain(body)

    limits = 'limits: [{key: "*", budget: $0.012/month}]'
    async with running(POLICY.format(url=upstream.url, limits=limits), tmp_path / "home") as gateway:
        upstream.faults = [weak, rival]
        first = asyncio.create_task(gateway.chat(ask(model="two", max_tokens=100)))
        await asked.wait()
        second = asyncio.create_task(gateway.chat(ask(model="dear", max_tokens=780)))
        status, headers, _ = await first
        let_go.set()
        assert (status, headers["x-leadline-model"], headers["x-leadline-degraded"]) == (200, "cheap", "not_accepted")
        assert (await second)[0] == 200
        assert sum(bill.nanousd for bill in upstream.truth) <= 12_000_000


@anyio
@pytest.mark.parametrize("ends", ["leaves", "deadline"])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_whoever_leaves_a_cascade_pays_for_what_was_asked_and_holds_nothing(
    upstream: FakeUpstream, tmp_path: Path, stream: bool, stage: int, ends: str
) -> None:
    asked = asyncio.Event()

    async def slow(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked.set()
        await asyncio.sleep(30)
        return web.Response()

    limits = 'limits: [{key: "*", budget: $1/month}]'
    async with running(POLICY.format(url=upstream.url, limits=limits), tmp_path / "home") as gateway:
        upstream.faults = [*[sure(0.3)] * stage, slow]
        headers = {"x-leadline-timeout": "4"} if ends == "deadline" else {}
        call = gateway.stream if stream else gateway.chat
        task = asyncio.create_task(call(ask(model="two", max_tokens=100), **headers))
        await asked.wait()
        if ends == "leaves":
            task.cancel()
            await asyncio.wait((task,))
        else:
            assert (await task)[0] == (200 if stage else 504), "late is better than nothing, if there is something"
        lifecycle = gateway.app.state.lifecycle
        await until(lambda: lifecycle.metrics.in_flight.value == 0)
        (row,) = await gateway.rows()
        (budget,) = lifecycle.budgets.all()
    attempts = row["attempt_rows"]
    assert [a["outcome"] for a in attempts] == ["not_accepted"] * stage + ["cancelled" if ends == "leaves" else ends]
    assert row["cost_nanousd"] == sum(a["cost_nanousd"] for a in attempts) == budget.spent_nanousd
    assert budget.reserved_nanousd == 0
    if not stream or stage == 0:  # asked whole
        price = 10_000 if stage else 600
        assert attempts[-1]["cost_nanousd"] >= 100 * price


@anyio
async def test_the_effort_is_told_in_the_words_of_the_provider(cascading: Gateway, upstream: FakeUpstream) -> None:
    answers = [
        await cascading.chat(ask(model="off")),
        await cascading.chat(ask(model="hard")),
        await cascading.chat(ask(model="hard", reasoning_effort="medium")),
        await cascading.chat(ask(model="fixed")),
        await cascading.chat(ask(model="cheap"), **{"x-leadline-effort": "low"}),
        await cascading.chat(ask(model="hard"), **{"x-leadline-effort": "high"}),
        await cascading.chat(ask(model="hard", enable_thinking=False)),
    ]
    sent = [json.loads(body) for body in upstream.bodies]
    assert [body.get("reasoning_effort") for body in sent] == ["minimal", None, "medium", None, "low", None, None]
    assert [body.get("thinking_budget") for body in sent] == [None, 3000, None, None, None, 3000, None]
    assert [body.get("enable_thinking") for body in sent] == [None, True, None, None, None, True, False]
    rows = {row["id"]: row for row in await cascading.rows()}
    decisions = [msgspec.json.decode(rows[headers["x-request-id"]]["decision"]) for _, headers, _ in answers]
    plans = [decision["plan"] for decision in decisions]
    assert plans[1] == {"kind": "single", "model": "dear", "effort": "high", "max_thinking_tokens": 3000}
    assert plans[2].get("effort") is None, "the caller's own word stands"
    assert plans[3].get("effort") is None, "a model that cannot be told"


@anyio
async def test_a_model_may_think_more_where_its_first_answer_is_not_accepted(
    cascading: Gateway, upstream: FakeUpstream
) -> None:
    """Each stage at its own effort, and paid for by itself."""
    upstream.faults = [sure(0.2)]
    asked = ask(model="more", max_tokens=100)
    async with cascading.session.post(
        f"{cascading.url}/leadline/v1/explain", json=asked, headers=cascading.headers()
    ) as response:
        worst = (await response.json())["decision"]["worst_case_nanousd"]
    status, _, _ = await cascading.chat(asked)
    row = (await cascading.rows())[0]
    assert status == 200
    assert [json.loads(body).get("reasoning_effort") for body in upstream.bodies] == ["minimal", "high"]
    assert worst >= row["reserved_nanousd"] > row["cost_nanousd"] > 0


@anyio
async def test_a_model_that_is_to_be_concise_is_told_so_where_a_prefix_stays_the_same(
    cascading: Gateway, upstream: FakeUpstream
) -> None:
    asked = ask(model="brief")
    await cascading.chat(asked)
    rules = {"role": "system", "content": "Be kind."}
    await cascading.chat({**asked, "messages": [rules, *asked["messages"]]})
    alone, after = (json.loads(body)["messages"] for body in upstream.bodies)
    assert [message["role"] for message in alone] == [message["role"] for message in after] == ["system", "user"]
    assert alone[0]["content"] in after[0]["content"]
    assert after[0]["content"].startswith("Be kind.\n\n")
    assert alone[1] == after[1] == asked["messages"][0]
    held = [row["reserved_nanousd"] for row in await cascading.rows()]
    assert held == [0, 0]
    await cascading.chat(ask(model="plain"))
    assert json.loads(upstream.bodies[-1])["messages"] == asked["messages"]
