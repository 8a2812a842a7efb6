"""Models that are asked at the same time, end to end: what they agree on is sent, else the last one answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway import fake_upstream as fake
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.test_cascade import bill, told
from tests.serving import as_asked, begin_events, event

anyio = pytest.mark.anyio

POLICY = (
    fake.TWO_MODELS
    + """\
  other: {{provider: fake, model: other, context: 16000, max_output: 1000, logprobs: false,
          price: {{input: $0.30/Mtok, cached_input: $0.15/Mtok, output: $1.20/Mtok}}}}
  third: {{provider: fake, model: third, context: 16000, max_output: 1000,
          price: {{input: $0.60/Mtok, cached_input: $0.30/Mtok, output: $2.40/Mtok}}}}
routes:
  - {{name: beside, when: {{model: beside}}, candidates: ["cheap&other>dear"], accept: {accept}, cache: off}}
  - {{name: turns, when: {{model: turns}}, candidates: ["cheap>other>dear"], accept: {accept}, cache: off}}
  - {{name: three, when: {{model: three}}, candidates: ["cheap&other&third>dear"], accept: {accept}, cache: off}}
  - {{name: one, when: {{model: one}}, candidates: ["third>cheap&other>dear"], accept: {accept}, cache: off}}
{limits}
"""
)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
ANSWER: dict[str, str | int] = {
    "cheap": "It is so.\n\nAnswer: 42",
    "other": '{"reasoning": "As asked.", "answer": 42}',
    "third": "#### 42",
}
Says = Mapping[str, str | int]
"""By model, what it answers, or the status of its error."""


def saying(of: Says) -> fake.Fault:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        words = of[body["model"]]
        if isinstance(words, int):
            return await fake.status(words)(upstream, request, body)
        answered = await upstream.plain(body)
        whole = json.loads(answered.body)  # type: ignore[arg-type]
        whole["choices"][0]["message"]["content"] = words
        return await as_asked(request, body, whole)

    return play


@pytest.fixture
async def agreeing(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(POLICY.format(url=upstream.url, accept="agree", limits=""), tmp_path / "home") as gateway:
        yield gateway


@anyio
@STREAMED
async def test_what_two_agree_on_is_sent_and_the_last_is_not_asked(
    agreeing: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [saying(ANSWER)] * 2
    headers, model, words = await told(agreeing, "beside", stream=stream)
    assert (headers["x-leadline-model"], model, words) == ("cheap", "cheap", [str(ANSWER["cheap"]).encode()])
    assert headers["x-leadline-plan"] == "cascade; stages=3; asked=2; agreed=2"
    assert await bill(agreeing, upstream) == [("cheap", "first", "ok"), ("other", "beside", "agreed")]
    sent = [json.loads(body) for body in upstream.bodies]
    assert not any("logprobs" in body for body in sent), "answers are compared, not their chances"


@anyio
@STREAMED
async def test_where_they_differ_the_last_answers_and_nothing_of_them_shows(
    agreeing: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [saying(ANSWER | {"other": "41"})] * 2
    headers, model, words = await told(agreeing, "beside", stream=stream)
    assert (headers["x-leadline-model"], model) == ("dear", "dear")
    assert words == [b" ".join(b"w%d" % at for at in range(12))]
    expected = [("cheap", "first", "not_accepted"), ("other", "beside", "not_accepted"), ("dear", "escalation", "ok")]
    assert await bill(agreeing, upstream) == expected
    assert headers["x-leadline-plan"] == "cascade; stages=3; asked=2; agreed=0"


@anyio
async def test_a_round_is_asked_at_the_same_time_and_its_wait_counts_once(
    agreeing: Gateway, upstream: FakeUpstream
) -> None:
    both = asyncio.Barrier(2)

    async def meet(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        async with asyncio.timeout(20):
            await both.wait()
        await asyncio.sleep(0.3)
        return await saying(ANSWER)(upstream, request, body)

    upstream.faults = [meet, meet]
    _, model, _ = await told(agreeing, "beside", stream=False)
    assert model == "cheap"
    row = (await agreeing.rows())[0]
    assert 0 <= row["overhead_us"] <= row["first_byte_us"] - 300_000, "neither of the waits is ours"


@anyio
@STREAMED
@pytest.mark.parametrize(("failing", "kinds"), [("cheap", ["first", "beside"]), ("other", ["first", "beside"])])
async def test_one_of_two_that_fails_agrees_with_nobody(
    agreeing: Gateway, upstream: FakeUpstream, failing: str, kinds: list[str], stream: bool
) -> None:
    upstream.faults = [saying({**ANSWER, failing: 500})] * 2
    headers, *_ = await told(agreeing, "beside", stream=stream)
    assert headers["x-leadline-model"] == "dear"
    attempts = (await agreeing.rows())[0]["attempt_rows"]
    assert [(a["model"], a["kind"]) for a in attempts] == [
        *zip(["cheap", "other"], kinds, strict=True),
        ("dear", "fallback"),
    ]
    assert {a["model"]: a["outcome"] for a in attempts if a["model"] not in (failing, "dear")}.popitem()[
        1
    ] == "not_accepted"
    upstream.faults = [*[saying({**ANSWER, failing: 500})] * 2, fake.status(500)]
    headers, model, _ = await told(agreeing, "beside", stream=stream)
    assert model == ({"cheap", "other"} - {failing}).pop(), "the one answer there is"
    assert (await agreeing.rows())[0]["degraded"] == "not_accepted"


@anyio
async def test_one_after_the_other_agrees_with_those_before(agreeing: Gateway, upstream: FakeUpstream) -> None:
    upstream.faults = [saying(ANSWER)] * 2
    _, model, _ = await told(agreeing, "turns", stream=False)
    assert model == "other"
    assert await bill(agreeing, upstream) == [("cheap", "first", "agreed"), ("other", "escalation", "ok")]
    upstream.faults = [saying(ANSWER | {"cheap": "no"})] * 2
    _, model, _ = await told(agreeing, "turns", stream=False)
    assert model == "dear"


@anyio
@STREAMED
async def test_who_agrees_with_one_of_a_round_before_is_counted_with_it(
    agreeing: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.faults = [saying(ANSWER | {"other": "41"})] * 3
    headers, model, _ = await told(agreeing, "one", stream=stream)
    assert model == "cheap"
    assert headers["x-leadline-plan"].startswith("cascade; stages=4; asked=3; agreed=2")
    third, cheap, other = (await agreeing.rows())[0]["attempt_rows"]
    assert [(a["kind"], a["outcome"]) for a in (third, cheap)] == [("first", "agreed"), ("escalation", "ok")]
    assert other["outcome"] in ("not_accepted", "not_needed"), "whether it came before"
    async with agreeing.session.get(f"{agreeing.url}/metrics") as response:
        counted = await response.text()
    assert 'leadline_attempts_total{model="third",outcome="agreed",provider="fake"} 1' in counted
    assert 'model="third",outcome="not_accepted"' not in counted


@anyio
@STREAMED
@pytest.mark.parametrize("agree", [True, False], ids=["agreed", "hopeless"])
async def test_who_can_change_nothing_any_more_is_stopped_and_paid_for_what_it_wrote(
    upstream: FakeUpstream, tmp_path: Path, agree: bool, stream: bool
) -> None:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] == "dear":
            return await (upstream.stream(request, body) if body.get("stream") else upstream.plain(body))
        if body["model"] != "third":
            await writing.wait()
            return await saying(ANSWER if agree else ANSWER | {"other": "41"})(upstream, request, body)
        response = await begin_events(request)
        await response.write(event({"choices": [{"index": 0, "delta": {"content": "four"}, "finish_reason": None}]}))
        writing.set()
        try:
            await asyncio.sleep(3600)
        finally:
            stopped.set()
        raise AssertionError

    writing, stopped = asyncio.Event(), asyncio.Event()
    accept = "agree" if agree else "{agree: 3}"
    policy = POLICY.format(url=upstream.url, accept=accept, limits='limits: [{key: "*", budget: $1/month}]')
    if not agree:  # three cannot agree on the routes that ask fewer
        policy = "\n".join(
            line for line in policy.splitlines() if not line.startswith(("  - {name: beside", "  - {name: turns"))
        )
    async with running(policy, tmp_path / "home") as gateway:
        upstream.faults = [play] * 4
        headers, model, _ = await told(gateway, "three", stream=stream, max_tokens=500)
        await stopped.wait()
        (row,) = await gateway.rows()
        (budget,) = gateway.app.state.lifecycle.budgets.all()
    assert model == ("cheap" if agree else "dear")
    assert headers["x-leadline-plan"] == f"cascade; stages=4; asked=3; agreed={2 if agree else 0}; not_needed=1"
    outcomes = {a["model"]: a["outcome"] for a in row["attempt_rows"]}
    expected = {"cheap": "ok", "other": "agreed"} if agree else dict.fromkeys(("cheap", "other"), "not_accepted")
    assert outcomes == expected | {"third": "not_needed"} | ({} if agree else {"dear": "ok"})
    third = next(a for a in row["attempt_rows"] if a["model"] == "third")
    assert third["output_tokens"] <= 2
    assert row["cost_nanousd"] == sum(a["cost_nanousd"] for a in row["attempt_rows"]) == budget.spent_nanousd
    assert budget.reserved_nanousd == 0
    exact = sum(a["cost_nanousd"] for a in row["attempt_rows"] if a["model"] != "third")
    assert exact == sum(bill.nanousd for bill in upstream.truth)


@anyio
async def test_the_same_call_of_a_tool_agrees_and_another_one_does_not(
    agreeing: Gateway, upstream: FakeUpstream
) -> None:
    def calling(**arguments: str) -> fake.Fault:
        async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            answered = json.loads((await upstream.plain(body)).body)  # type: ignore[arg-type]
            function = {"name": "pay", "arguments": arguments[body["model"]]}
            call = {"id": f"call_{body['model']}", "type": "function", "function": function}
            answered["choices"][0] |= {
                "message": {"role": "assistant", "content": None, "tool_calls": [call]}, "finish_reason": "tool_calls",
            }  # fmt: skip
            return await as_asked(request, body, answered)

        return play

    for other, model in (('{"to":"bob","amount":5}', "cheap"), ('{"to":"bob","amount":6}', "dear")):
        upstream.faults = [calling(cheap='{"amount": 5, "to": "bob"}', other=other)] * 2
        tools = [{"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}]
        _, headers, _ = await agreeing.chat(ask(model="beside", tools=tools))
        assert headers["x-leadline-model"] == model


@anyio
@STREAMED
@pytest.mark.parametrize("unaccepted", ["send", "fail"])
@pytest.mark.parametrize("late", ["other", "dear"])
async def test_when_time_is_up_what_is_there_is_sent_where_the_policy_says_so(
    upstream: FakeUpstream, tmp_path: Path, late: str, unaccepted: str, stream: bool
) -> None:
    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] == late:
            await asyncio.sleep(60)
        return await saying(ANSWER | {"other": "41"})(upstream, request, body)

    accept, limits = f"{{agree: 2, unaccepted: {unaccepted}}}", 'limits: [{key: "*", budget: $1/month}]'
    policy = POLICY.format(url=upstream.url, accept=accept, limits=limits)
    async with running(policy, tmp_path / "home") as gateway:
        upstream.faults = [play] * 3
        call: Any = gateway.stream if stream else gateway.chat
        status, _, body = await call(ask(model="beside", max_tokens=100), **{"x-leadline-timeout": "4"})
        lifecycle = gateway.app.state.lifecycle
        await until(lambda: lifecycle.metrics.in_flight.value == 0)
        (row,) = await gateway.rows()
        (budget,) = lifecycle.budgets.all()
    assert status == (200 if unaccepted == "send" else 504), body
    outcomes = {a["model"]: a["outcome"] for a in row["attempt_rows"]}
    assert outcomes == {"cheap": "not_accepted", "other": "not_accepted", "dear": "deadline"} if late == "dear" else {
        "cheap": "not_accepted", "other": "deadline",
    }  # fmt: skip
    known = next(a for a in row["attempt_rows"] if a["model"] == "cheap")
    assert not known["cost_estimated"], "it said what it cost before the time was up"
    assert row["cost_nanousd"] == sum(a["cost_nanousd"] for a in row["attempt_rows"]) == budget.spent_nanousd
    assert budget.reserved_nanousd == 0
    if unaccepted == "send":
        assert (row["outcome"], row["model_served"], row["degraded"]) == ("ok", "cheap", "not_accepted")
        assert (b"Answer: 42" in body) if stream else body["choices"][0]["message"]["content"] == ANSWER["cheap"]


@anyio
@STREAMED
async def test_who_leaves_a_round_holds_nothing_of_either(upstream: FakeUpstream, tmp_path: Path, stream: bool) -> None:
    asked = asyncio.Semaphore(0)

    async def slow(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked.release()
        await asyncio.sleep(60)
        return web.Response()

    policy = POLICY.format(url=upstream.url, accept="agree", limits='limits: [{key: "*", budget: $1/month}]')
    async with running(policy, tmp_path / "home") as gateway:
        upstream.faults = [slow, slow]
        task = asyncio.create_task((gateway.stream if stream else gateway.chat)(ask(model="beside", max_tokens=100)))
        for _ in range(2):
            await asked.acquire()
        task.cancel()
        await asyncio.wait((task,))
        lifecycle = gateway.app.state.lifecycle
        await until(lambda: lifecycle.metrics.in_flight.value == 0)
        (row,) = await gateway.rows()
        (budget,) = lifecycle.budgets.all()
    assert [a["outcome"] for a in row["attempt_rows"]] == ["cancelled", "cancelled"]
    assert 0 < row["cost_nanousd"] == budget.spent_nanousd < 100 * (600 + 1200), "for what was read"
    assert budget.reserved_nanousd == 0


@pytest.mark.parametrize(
    ("candidates", "accept", "words"),
    [
        ("cheap&other", "agree", "add who answers where they differ"),
        ("cheap>dear", "agree", "no 2 can agree before the last answers"),
        ("cheap&other>dear", "{agree: 3}", "no 3 can agree before the last answers"),
        ("cheap&other>dear", "{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}", "each by itself"),
        ("cheap&other>dear", "{agree: 2, at_least: 0.5}", "is not judged by P(correct), too"),
        ("cheap&other>dear", "{agree: 2, keeps_right: 0.9}", "give both keeps_right and keeps_wrong"),
        ("cheap&other>dear", "{agree: 1}", "write 2 or more"),
        ("cheap&other>dear", "{}", "add `keeps_right:`, the share of right answers"),
        ("cheap&other>dear", "most", "write `agree`"),
        ("cheap&cheap>dear", "agree", "asks the same twice"),
        ("cheap&>dear", "agree", "such as one&other>strong"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_fix(candidates: str, accept: str, words: str) -> None:
    from routers.errors import PolicyError
    from routers.load import parse

    text = POLICY.format(url="http://127.0.0.1:9/v1", accept="agree", limits="")
    text = text.replace(
        'candidates: ["cheap&other>dear"], accept: agree', f'candidates: ["{candidates}"], accept: {accept}'
    )
    with pytest.raises(PolicyError, match=r"policy\.yaml:1") as refused:
        parse(text)
    assert words in str(refused.value)
