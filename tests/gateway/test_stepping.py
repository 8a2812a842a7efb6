"""A thought shared by two models over their APIs: who wrote what, what was read again, what it cost, and what broke."""

import asyncio
import json
import os
import signal
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from local_engine.arithmetic import problems
from routers.errors import PolicyError
from routers.load import parse
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.reasoner import ANSWER, BAD, STEPS, Mind, Reasoner, failing, reset, saying

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  far: {{base_url: "{url}", timeout: 30s, retries: 0, breaker: off, server: {server}}}
  near: {{base_url: "{url}", timeout: 30s, retries: 0, breaker: off, server: vllm}}
models:
  strong: {{provider: far, model: base, context: 16000, max_output: 2000, prefix: true, {base}
           price: {{input: $2.50/Mtok, cached_input: $0.25/Mtok, output: $10/Mtok}},
           plan: {{speculate: {{draft: weak, {plan}}}}}}}
  weak: {{provider: near, model: draft, context: 16000, max_output: 2000, prefix: true,
         price: {{input: $0.15/Mtok, cached_input: $0.015/Mtok, output: $0.60/Mtok}}}}
routes:
  - {{name: think, when: {{model: think}}, use: [strong], on_failure: [weak], cache: off}}
"""
QUESTION = " ".join(f"word{n}" for n in range(40))
RIGHT = "\n\n".join(STEPS) + "\n\n"
NINE = {"token": "9", "logprob": 0.0}
DEAR = saying({"reasoning_content": "9"}, 300, listed={**NINE, "top_logprobs": [NINE]})
"""A good mark that costs as much as a long answer."""


def start(
    far: Reasoner, home: Path, plan: str = "method: specreason", *, server: str = "vllm", base: str = ""
) -> AbstractAsyncContextManager[Gateway]:
    return running(POLICY.format(url=far.url, server=server, plan=plan, base=base), home)


def ask(model: str = "strong", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}


async def told(gateway: Gateway, *, stream: bool, **fields: Any) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """(the thought, the answer, the usage, what the plan did) of one call."""
    if not stream:
        status, headers, body = await gateway.chat(ask(**fields))
        assert status == 200, body
        kind, *counts = headers["x-leadline-plan"].split("; ")
        plan = {"kind": kind, **dict(count.split("=", 1) for count in counts)}
        message = body["choices"][0]["message"]
        return message.get("reasoning_content") or "", message["content"] or "", body["usage"], plan
    status, headers, raw = await gateway.stream(ask(**fields, stream_options={"include_usage": True}))
    assert status == 200, raw
    assert raw.endswith(b"data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert len({event["id"] for event in events}) == 1
    thought, answer = ("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))
    last = events[-1]
    return thought, answer, last["usage"], {name: str(value) for name, value in last["leadline"]["plan"].items()}


async def books(gateway: Gateway, far: Reasoner) -> list[tuple[str, str, str]]:
    """(model, kind, outcome) of the last request's attempts: every one of them as the provider has it in its books."""
    row = (await gateway.rows())[0]
    attempts = row["attempt_rows"]
    kept = [(a["model"], a["input_tokens"] + a["cached_input_tokens"], a["cached_input_tokens"], a["cost_nanousd"])
            for a in attempts]  # fmt: skip
    names = {"base": "strong", "draft": "weak"}
    assert kept == [(names[bill.model], bill.prompt, bill.cached, bill.nanousd) for bill in far.truth]
    assert row["cost_nanousd"] == sum(bill.nanousd for bill in far.truth)
    return [(a["model"], a["kind"], a["outcome"]) for a in attempts]


def turns(attempts: list[tuple[str, str, str]]) -> str:
    """One letter for each: d draft, x one that did not stand, v verify, s step, t think, a answer."""
    return "".join("x" if outcome == "not_accepted" else kind[0] for _, kind, outcome in attempts)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("server", "separates"), [("vllm", True), ("vllm", False), ("openai", True), ("llamacpp", True)]
)
async def test_a_draft_writes_what_the_base_finds_good(
    far: Reasoner, tmp_path: Path, server: str, separates: bool, stream: bool
) -> None:
    far.minds["draft"] = Mind([*STEPS[:2], BAD, *STEPS[3:]])
    far.minds["base"] = Mind(separates=separates)
    async with start(far, tmp_path / "home", server=server) as gateway:
        thought, answer, usage, plan = await told(gateway, stream=stream)
        assert (thought, answer) == (RIGHT, ANSWER)
        attempts = await books(gateway, far)
    assert turns(attempts) == "dvdvxvs" + "dv" * 3 + "dt"
    assert (plan["drafted_steps"], plan["accepted_steps"], plan["escalated_steps"]) == ("6", "5", "1")
    assert (plan["kind"], plan["verifications"]) == ("speculate", "6")
    thinking = usage["completion_tokens_details"]["reasoning_tokens"]
    assert thinking == sum(len(step.split()) for step in STEPS)
    assert usage["completion_tokens"] == thinking + far.truth[-1].completion
    assert usage["prompt_tokens"] == far.truth[0].prompt
    base = [bill for bill in far.truth if bill.model == "base"]
    assert int(plan["cached_tokens"]) == sum(bill.cached for bill in base)
    read = [bill.prompt - bill.cached for bill in base[1:]]
    longest = max(len(step.split()) for step in [*STEPS, BAD])
    assert max(read) <= 2 * longest + 8, "what was read once is cached: new are a step, one of its own, a cue, a block"
    assert sum(bill.cached for bill in base) > 0.7 * sum(bill.prompt for bill in base[1:])
    assert far.bodies[-1]["messages"][:-1] == far.bodies[0]["messages"][:-1], "the conversation stays as it came"


async def test_the_first_tokens_entropy_says_who_writes(far: Reasoner, tmp_path: Path) -> None:
    far.minds["draft"] = Mind(unsure=frozenset({1, 4}))
    async with start(far, tmp_path / "home", "method: glimprouter") as gateway:
        assert (await told(gateway, stream=True))[:2] == (RIGHT, ANSWER)
        kinds = turns(await books(gateway, far))
    assert kinds == "dd" + "xs" + "dd" * 2 + "xs" + "dd" + "da"
    glimpses = [body for body in far.bodies if body.get("max_tokens") == 1]
    assert {(body["model"], body["top_logprobs"]) for body in glimpses} == {("draft", 20)}


async def test_words_of_doubt_hand_the_thought_over(far: Reasoner, tmp_path: Path) -> None:
    doubt = "Wait, is that right? " + "Not so sure about any of it now. " * 4
    far.minds["draft"] = Mind([STEPS[0], doubt.strip(), *STEPS[2:]])
    async with start(far, tmp_path / "home", "method: speculative_thinking") as gateway:
        assert (await told(gateway, stream=False))[:2] == (RIGHT, ANSWER)
        assert turns(await books(gateway, far)) == "dxs" + "d" * 5 + "a"


async def test_a_draft_in_doubt_of_a_word_is_relieved_there(far: Reasoner, tmp_path: Path) -> None:
    far.minds["draft"] = Mind(unsure=frozenset({2}))
    async with start(far, tmp_path / "home", "method: entropy, threshold: 0.3") as gateway:
        assert (await told(gateway, stream=False))[:2] == (RIGHT, ANSWER)
        kinds = turns(await books(gateway, far))
    assert kinds == "ddxs" + "d" * 3 + "da"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("hook", [failing, reset])
async def test_without_its_draft_the_base_goes_on_alone(far: Reasoner, tmp_path: Path, hook: Any, stream: bool) -> None:
    far.hooks["draft"] = [None, None, hook]
    async with start(far, tmp_path / "home") as gateway:
        thought, answer, _, plan = await told(gateway, stream=stream)
        row = (await gateway.rows())[0]
    assert (thought, answer) == (RIGHT, ANSWER)
    assert plan["degraded"] == "draft_failed"
    kinds = [attempt["kind"] for attempt in row["attempt_rows"]]
    assert kinds == ["draft", "verify", "draft", "verify", "draft", "think"]
    assert row["outcome"] == "ok"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_base_that_is_gone_before_a_word_was_told_is_replaced(
    far: Reasoner, tmp_path: Path, stream: bool
) -> None:
    far.hooks["base"] = [failing]
    async with start(far, tmp_path / "home") as gateway:
        fields = {"model": "think"}
        if stream:
            status, _, raw = await gateway.stream(ask(**fields))
            assert raw.endswith(b"data: [DONE]\n\n")
        else:
            status, _, body = await gateway.chat(ask(**fields))
            assert body["choices"][0]["message"]["content"] == ANSWER
        row = (await gateway.rows())[0]
    assert status == 200
    assert [(a["model"], a["kind"]) for a in row["attempt_rows"]] == [
        ("weak", "draft"), ("strong", "verify"), ("weak", "fallback"),
    ]  # fmt: skip
    assert (row["outcome"], row["model_served"]) == ("ok", "weak")


@pytest.mark.parametrize("hook", [failing, reset])
async def test_a_base_that_dies_mid_step_ends_the_stream_as_an_error_and_is_settled(
    far: Reasoner, tmp_path: Path, hook: Any
) -> None:
    far.hooks["base"] = [None, None, hook]
    async with start(far, tmp_path / "home") as gateway:
        _, _, raw = await gateway.stream(ask())
        row = (await gateway.rows())[0]
    assert b"[DONE]" not in raw
    assert b'"error"' in raw
    assert row["outcome"] == "error"
    assert [a["kind"] for a in row["attempt_rows"]] == ["draft", "verify"] * 3
    paid = sum(a["cost_nanousd"] for a in row["attempt_rows"] if a["outcome"] == "ok")
    assert paid == sum(bill.nanousd for bill in far.truth)
    assert row["cost_nanousd"] >= paid


async def test_who_leaves_mid_step_pays_for_what_was_asked_and_no_more_is(far: Reasoner, tmp_path: Path) -> None:
    hanging = asyncio.Event()

    async def hang(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        hanging.set()
        try:
            await asyncio.sleep(3600)
        finally:
            upstream.left += 1
        raise AssertionError

    far.hooks["draft"] = [None, hang]
    async with start(far, tmp_path / "home") as gateway:
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions", json={**ask(), "stream": True}, headers=gateway.headers()
        ) as response:
            await response.content.readuntil(b"\n\n")
            await hanging.wait()
            response.close()
        await until(lambda: far.left)
        lifecycle = gateway.app.state.lifecycle
        await until(lambda: not lifecycle.metrics.in_flight.value)
        row = (await gateway.rows())[0]
    assert row["outcome"] == "cancelled"
    assert [(a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [
        ("draft", "ok"), ("verify", "ok"), ("draft", "cancelled"),
    ]  # fmt: skip
    asked = sum(bill.nanousd for bill in far.truth)
    assert asked <= row["cost_nanousd"]
    assert len(far.bodies) == 3, "nothing was asked for nobody"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_endless_loop_of_wait_is_closed(far: Reasoner, tmp_path: Path, stream: bool) -> None:
    far.minds["draft"] = Mind(["Wait, let me think about that once more."] * 100, closes=False)
    async with start(far, tmp_path / "home") as gateway:
        thought, answer, _, plan = await told(gateway, stream=stream)
        assert turns(await books(gateway, far)) == "dv" * 3 + "a"
    assert (thought.count("Wait"), answer, plan["closed_by"]) == (3, ANSWER, "repeats")


@pytest.mark.parametrize("separates", [True, False])
async def test_a_thought_that_never_closes_is_closed_for_its_model_and_answered(
    far: Reasoner, tmp_path: Path, separates: bool
) -> None:
    far.minds["draft"] = Mind([], closes=False)  # it has nothing to say: the base thinks by itself
    far.minds["base"] = Mind(closes=False, separates=separates)
    async with start(far, tmp_path / "home") as gateway:
        thought, answer, _, plan = await told(gateway, stream=True)
        attempts = await books(gateway, far)
    assert turns(attempts) == "dta"
    assert (thought.strip(), answer) == (RIGHT.strip(), ANSWER)
    assert plan["closed_by"] == "unclosed"


async def test_a_base_that_does_not_think_answers_what_its_draft_has_thought(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(tags=False, separates=False)
    async with start(far, tmp_path / "home", "method: glimprouter") as gateway:
        assert (await told(gateway, stream=True))[:2] == (RIGHT, ANSWER)
        assert turns(await books(gateway, far)) == "dd" * 6 + "da"


async def test_limits_that_leave_no_room_end_by_length_and_say_so(far: Reasoner, tmp_path: Path) -> None:
    async with start(far, tmp_path / "home", "method: specreason, max_thinking_tokens: 20") as gateway:
        _, answer, usage, plan = await told(gateway, stream=False)
        assert (answer, plan["closed_by"]) == (ANSWER, "budget")
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 20
        status, _, body = await gateway.chat(ask(max_tokens=15))
        row = (await gateway.rows())[0]
    assert status == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 15
    assert row["cost_nanousd"] <= row["reserved_nanousd"]


async def test_a_base_without_log_probabilities_rates_nothing_good(far: Reasoner, tmp_path: Path) -> None:
    far.hooks["base"] = [saying({"role": "assistant", "content": "9"}, 1)]
    async with start(far, tmp_path / "home") as gateway:
        thought, answer, _, _ = await told(gateway, stream=False)
        assert turns(await books(gateway, far)).startswith("xvsdv")
    assert (thought, answer) == (RIGHT, ANSWER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("n", 2),
    ],
)
async def test_what_the_plan_is_not_for_runs_without_and_says_why(
    far: Reasoner, tmp_path: Path, field: str, value: Any
) -> None:
    asked = ask(**{field: value})
    if field == "logprobs":
        asked["top_logprobs"] = 2
    async with start(far, tmp_path / "home") as gateway:
        _, headers, _ = await gateway.chat(asked)
        assert headers["x-leadline-plan"] == f"none; reason={field}"
        row = (await gateway.rows())[0]
        assert [attempt["kind"] for attempt in row["attempt_rows"]] == ["first"]
        assert json.loads(row["plan"]) == {"kind": "none", "reason": field}
        _, headers, raw = await gateway.stream({**asked, "seed": 1, "stream_options": {"include_usage": True}})
        assert headers["x-leadline-plan"] == f"none; reason={field}"
        last = [line for line in raw.split(b"\n") if line.startswith(b"data: {")][-1]
        assert json.loads(last[6:])["leadline"]["plan"] == {"kind": "none", "reason": field}
        async with gateway.session.post(
            f"{gateway.url}/leadline/v1/explain", json=asked, headers=gateway.headers()
        ) as response:
            lines = (await response.json())["lines"]
    assert f"plan of strong: does not run for this request, which has {field}" in lines


async def test_a_plan_over_calls_is_for_the_first_choice_and_elsewhere_says_why_not(
    far: Reasoner, tmp_path: Path
) -> None:
    far.hooks["draft"] = [failing]
    policy = POLICY.format(url=far.url, server="vllm", plan="method: specreason", base="")
    policy = policy.replace("use: [strong], on_failure: [weak]", "use: [weak], on_failure: [strong]")
    async with running(policy, tmp_path / "home") as gateway:
        _, headers, _ = await gateway.chat(ask(model="think"))
        row = (await gateway.rows())[0]
    assert headers["x-leadline-plan"] == "none; reason=fallback"
    assert [(a["model"], a["kind"]) for a in row["attempt_rows"]] == [("weak", "first"), ("strong", "fallback")]


async def test_a_budget_that_ends_mid_thought_ends_the_answer_there(far: Reasoner, tmp_path: Path) -> None:
    policy = POLICY.format(url=far.url, server="vllm", plan="method: specreason", base="")
    far.hooks["base"] = [None, DEAR]
    async with running(policy + 'limits: [{key: "*", budget: $0.0056/day}]\n', tmp_path / "home") as gateway:
        status, _, raw = await gateway.stream(ask(max_tokens=100))
        row = (await gateway.rows())[0]
    assert (status, row["outcome"], row["error_code"]) == (200, "refused", "budget_exceeded")
    assert b"[DONE]" not in raw
    assert row["cost_nanousd"] == sum(bill.nanousd for bill in far.truth) < 5_600_000


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("method: specreason", "method: score", "`score` reads both models' tokens within one engine"),
        ("prefix: true, logprobs", "logprobs", "does not go on from the start of an answer"),
        ("prefix: true,\n", "\n", "weak does not go on from the start of an answer"),
        ("logprobs: true", "logprobs: false", "returns no log probabilities, which specreason reads"),
        ("draft: weak", "draft: weka", "did you mean"),
        ("speculate: {draft: weak, method: specreason}", "vote: {}", "only the local engine runs vote"),
        ("speculate: {draft: weak, method: specreason}", "exit: {}", "a probe reads hidden states"),
        ("speculate: {draft: weak, method: specreason}", "exit: {rule: budget}", "no budget was fitted"),
    ],
)
def test_a_plan_over_calls_that_cannot_run_is_refused_with_its_place(old: str, new: str, problem: str) -> None:
    text = POLICY.format(url="http://h/v1", server="vllm", plan="method: specreason", base="logprobs: true,")
    assert old in text
    with pytest.raises(PolicyError) as caught:
        parse(text.replace(old, new, 1))
    assert problem in str(caught.value)
    assert "models.strong.plan" in str(caught.value)


@pytest.mark.engine
async def test_a_draft_whose_engine_is_killed_mid_thought_leaves_the_base_alone(far: Reasoner, tmp_path: Path) -> None:
    async with running(local_draft(far), tmp_path / "home") as gateway:
        engine = gateway.app.engine
        assert engine is not None
        async with asyncio.timeout(120):
            await engine.ready.wait()

        async def kill(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> None:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.client is None)

        far.hooks["base"] = [kill]
        status, headers, answer = await gateway.chat(
            {**ask(), "messages": [{"role": "user", "content": problems(7, 4, 1)[0].question}]}
        )
        row = (await gateway.rows())[0]
    assert status == 200
    assert "degraded=draft_failed" in headers["x-leadline-plan"]
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert [a["kind"] for a in row["attempt_rows"]] == ["draft", "verify", "draft", "think"]
    assert row["outcome"] == "ok"


def local_draft(far: Reasoner) -> str:
    policy = POLICY.format(url=far.url, server="vllm", plan="method: specreason", base="").replace(
        "  weak: {provider: near, model: draft, context: 16000, max_output: 2000, prefix: true,",
        "  weak: {provider: home, model: bundled/draft, context: 1024, max_output: 800,",
    )
    return policy.replace("providers:\n", "providers:\n  home: {engine: embedded, retries: 0}\n")


@pytest.mark.engine
async def test_a_local_draft_thinks_for_a_base_behind_an_api(far: Reasoner, tmp_path: Path) -> None:
    """With another tokenizer, too: texts go from one to the other."""
    question = problems(7, 4, 1)[0].question
    far.minds["base"] = Mind([])  # it finds that all has been said
    async with running(local_draft(far), tmp_path / "home") as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(120):
            await gateway.app.engine.ready.wait()
        alone = (await gateway.chat({**ask("weak"), "messages": [{"role": "user", "content": question}]}))[2]
        body = {**ask(), "messages": [{"role": "user", "content": question}]}
        status, _, answer = await gateway.chat(body)
        row = (await gateway.rows())[0]
    assert status == 200
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == alone["choices"][0]["message"]["reasoning_content"].rstrip("\n") + "\n\n"
    assert message["content"] == ANSWER
    drafts = [a for a in row["attempt_rows"] if a["kind"] == "draft"]
    assert {a["provider"] for a in drafts} == {"home"}
    assert len(drafts) > 2
    assert all(a["cached_input_tokens"] for a in drafts), "its engine had the prompt, and the thought so far"
    assert max(a["input_tokens"] for a in drafts) <= 64, "a step, and a block that it does not fill"
    paid = sum(a["cost_nanousd"] for a in row["attempt_rows"] if a["provider"] == "far")
    assert paid == sum(bill.nanousd for bill in far.truth) > 0


async def test_explain_counts_all_that_a_thought_over_calls_may_be_billed(far: Reasoner, tmp_path: Path) -> None:
    async with start(far, tmp_path / "home") as gateway:
        asked = ask(max_tokens=200)
        async with gateway.session.post(
            f"{gateway.url}/leadline/v1/explain", json=asked, headers=gateway.headers()
        ) as response:
            told_before = await response.json()
        await gateway.chat(asked)
        row = (await gateway.rows())[0]
    assert told_before["decision"]["worst_case_nanousd"] >= row["reserved_nanousd"] > row["cost_nanousd"] > 0
    assert "plan of strong at effort low: speculate: draft weak, method specreason" in told_before["lines"]
