"""Plans over calls where something goes wrong: what is still told, who is asked no more, and what is paid and held."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.ledger.settle import Usage, cost_nanousd
from routers.explain import from_dict
from tests.gateway import test_leaving, test_stepping
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.reasoner import ANSWER, BAD, Mind, Reasoner, dying_after, failing, saying
from tests.gateway.test_leaving import PASSES
from tests.gateway.test_stepping import DEAR, RIGHT, ask, told
from tests.serving import events

pytestmark = pytest.mark.anyio


def leaving(far: Reasoner, plan: str, more: str = "") -> str:
    return test_leaving.POLICY.format(url=far.url, plan=plan, prefix="true", logprobs="true") + more


def stepping(far: Reasoner, plan: str = "method: specreason") -> str:
    return test_stepping.POLICY.format(url=far.url, server="vllm", plan=plan, base="")


def held(gateway: Gateway) -> int:
    return sum(budget.reserved_nanousd for budget in gateway.app.state.lifecycle.budgets.all())


async def hang(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    try:
        await asyncio.sleep(3600)
    finally:
        upstream.left += 1
    raise AssertionError


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_look_that_no_money_is_left_for_is_not_taken(far: Reasoner, tmp_path: Path, stream: bool) -> None:
    far.minds["base"] = Mind(PASSES[:3], answer="The answer is 42.")
    far.pace_s = 0.005
    policy = leaving(far, "rule: convergence, agree: 2", 'limits: [{key: "*", budget: $0.0065/day}]\n')
    async with running(policy, tmp_path / "home") as gateway:
        thought, answer, _, _ = await told(gateway, stream=stream, max_tokens=200)
        row = (await gateway.rows())[0]
        assert held(gateway) == 0
    assert (thought.strip(), answer) == ("\n\n".join(PASSES[:3]), "The answer is 42.")
    assert [a["kind"] for a in row["attempt_rows"]] == ["think"]


async def test_an_answer_that_is_there_waits_for_no_look(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(PASSES[:3], answer="The answer is 42.")
    far.hooks["base"] = [None, hang]
    policy = leaving(far, "rule: convergence, agree: 2", 'limits: [{key: "*", budget: $1/day}]\n')
    async with running(policy, tmp_path / "home") as gateway:
        status, _, raw = await gateway.stream(ask(), **{"x-leadline-timeout": "60"})
        row = (await gateway.rows())[0]
        assert held(gateway) == 0
    assert status == 200
    assert raw.endswith(b"data: [DONE]\n\n")
    assert [(a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [("think", "ok"), ("verify", "cancelled")]
    assert far.left == 1
    assert row["outcome"] == "ok"


async def test_an_answer_by_a_fallback_is_compared_with_its_own_usage(far: Reasoner, tmp_path: Path) -> None:
    far.hooks["base"] = [failing]
    async with running(stepping(far), tmp_path / "home") as gateway:
        _, _, body = await gateway.chat(ask(model="think"))
        row = (await gateway.rows())[0]
    usage = body["usage"]
    dearest = (usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]) * 2_500
    dearest += usage["prompt_tokens_details"]["cached_tokens"] * 250 + usage["completion_tokens"] * 10_000
    assert row["baseline_nanousd"] == dearest


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_stream_of_a_shape_nobody_knows_is_the_providers_failure(
    far: Reasoner, tmp_path: Path, stream: bool
) -> None:
    async def odd(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        choice = {"index": 0, "delta": {"content": "So"}, "logprobs": {"content": [{"token": "So"}]}}
        return await events(request, {"choices": [choice]})

    far.hooks["base"] = [odd]
    async with running(leaving(far, "rule: redundancy"), tmp_path / "home") as gateway:
        status, _, body = await (gateway.stream if stream else gateway.chat)(ask())
        row = (await gateway.rows())[0]
    assert status == 502, body
    assert [a["outcome"] for a in row["attempt_rows"]] == ["bad_answer"]


async def test_a_step_of_a_shape_nobody_knows_is_the_drafts_failure(far: Reasoner, tmp_path: Path) -> None:
    odd = {"role": "assistant", "reasoning_content": "So", "content": [{"type": "text", "text": "well"}]}
    far.hooks["draft"] = [saying(odd, 2, reason="stop")]
    async with running(stepping(far), tmp_path / "home") as gateway:
        thought, answer, _, plan = await told(gateway, stream=False)
    assert (thought, answer, plan["degraded"]) == (RIGHT, ANSWER, "draft_failed")


async def test_a_filtered_thought_is_not_asked_for_its_answer(far: Reasoner, tmp_path: Path) -> None:
    async def filtered(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        said: list[tuple[dict[str, str], str | None]] = [({"reasoning_content": "So"}, None), ({}, "content_filter")]
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in said]
        return await events(request, *chunks)

    far.hooks["base"] = [filtered]
    async with running(leaving(far, "rule: redundancy"), tmp_path / "home") as gateway:
        _, _, body = await gateway.chat(ask())
    assert body["choices"][0]["finish_reason"] == "content_filter"
    assert len(far.bodies) == 1


async def test_no_thought_is_longer_than_the_longest_answer_of_its_model(far: Reasoner, tmp_path: Path) -> None:
    """Else a request without a limit could cost more than `explain` says that it can."""
    many = [f"Step {n} " + " ".join(f"word{n}x{m}" for m in range(200)) for n in range(30)]
    far.minds["draft"] = far.minds["base"] = Mind(many)
    async with running(stepping(far), tmp_path / "home") as gateway:
        _, answer, usage, plan = await told(gateway, stream=False)
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= 2000
    assert (answer, plan["closed_by"]) == (ANSWER, "budget")


async def test_who_leaves_while_an_answer_is_forced_leaves_nothing_running(far: Reasoner, tmp_path: Path) -> None:
    far.pace_s = 0.01
    far.minds["base"] = Mind(PASSES * 20)
    far.hooks["base"] = [None, hang]
    policy = leaving(far, "rule: convergence, agree: 2", 'limits: [{key: "*", budget: $1/day}]\n')
    async with running(policy, tmp_path / "home") as gateway:
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions", json={**ask(), "stream": True}, headers=gateway.headers()
        ) as response:
            await response.content.readuntil(b"\n\n")
            await until(lambda: len(far.bodies) == 2)
            response.close()
        await until(lambda: far.left == 2)
        await until(lambda: not gateway.app.state.lifecycle.metrics.in_flight.value)
        row = (await gateway.rows())[0]
        assert held(gateway) == 0
    assert row["outcome"] == "cancelled"
    assert {(a["kind"], a["outcome"]) for a in row["attempt_rows"]} == {("think", "cancelled"), ("verify", "cancelled")}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("model", ["base", "draft"])
async def test_a_deadline_that_passes_mid_step_ends_the_call_and_gives_back_what_it_held(
    far: Reasoner, tmp_path: Path, model: str, stream: bool
) -> None:
    far.hooks[model] = [None, hang]
    policy = stepping(far) + 'limits: [{key: "*", budget: $1/day}]\n'
    async with running(policy, tmp_path / "home") as gateway:
        status, _, body = await (gateway.stream if stream else gateway.chat)(ask(), **{"x-leadline-timeout": "5"})
        await until(lambda: far.left)
        row = (await gateway.rows())[0]
        assert held(gateway) == 0
    assert status == (200 if stream else 504)
    assert not stream or (b"[DONE]" not in body and b'"error"' in body)
    assert (row["outcome"], row["error_code"]) == ("error", "deadline_exceeded")
    assert row["attempt_rows"][-1]["outcome"] == "deadline"


async def test_a_plans_stream_is_kept_and_replayed_whole(far: Reasoner, tmp_path: Path) -> None:
    async with running(stepping(far), tmp_path / "home") as gateway:
        first = await gateway.stream(ask(), **{"Idempotency-Key": "k1"})
        asked = len(far.bodies)
        again = await gateway.stream(ask(), **{"Idempotency-Key": "k1"})
        assert len(far.bodies) == asked
        cached = await gateway.chat(ask())
        assert len(far.bodies) == asked
    assert first[2] == again[2]
    assert first[2].count(b"[DONE]") == 1
    assert cached[1]["x-leadline-cache"] == "hit"
    assert cached[1]["x-leadline-model"] == "strong"
    assert cached[2]["choices"][0]["message"]["content"] == ANSWER


async def test_a_number_beyond_all_bounds_is_read_like_any_other(far: Reasoner, tmp_path: Path) -> None:
    steps = ["It comes to 1e9999999.", "Wait let me see: it comes to 1e9999999.", "Wait once more: it is 2."]
    far.minds["base"] = Mind(steps)
    async with running(leaving(far, "rule: redundancy"), tmp_path / "home") as gateway:
        _, answer, _, plan = await told(gateway, stream=True)
    assert (answer, plan["by"]) == (ANSWER, "redundancy")


async def test_a_budget_that_ends_after_a_retry_says_so_and_names_no_provider(far: Reasoner, tmp_path: Path) -> None:
    far.hooks["base"] = [failing, DEAR]
    policy = stepping(far).replace("retries: 0", "retries: 1") + 'limits: [{key: "*", budget: $0.0056/day}]\n'
    async with running(policy, tmp_path / "home") as gateway:
        await gateway.stream(ask(max_tokens=100))
        row = (await gateway.rows())[0]
    assert (row["outcome"], row["error_code"]) == ("refused", "budget_exceeded")


@pytest.mark.parametrize("thinking", [False, True], ids=["in its answer", "in its thought"])
async def test_a_plans_stream_that_breaks_in_its_answer_is_resumed(
    far: Reasoner, tmp_path: Path, thinking: bool
) -> None:
    far.minds["draft"] = Mind([]) if thinking else Mind()
    far.hooks["base"] = [dying_after(2)]
    method = "specreason" if thinking else "glimprouter"  # which asks the base for nothing but the answer
    policy = stepping(far, f"method: {method}")
    policy = policy.replace("on_failure: [weak]", "on_failure: [weak], on_stream_failure: resume")
    async with running(policy, tmp_path / "home") as gateway:
        status, _, raw = await gateway.stream(ask(model="think", stream_options={"include_usage": True}))
        row = (await gateway.rows())[0]
        candidates = from_dict(json.loads(row["decision"])).candidates
        dearest = gateway.app.state.lifecycle.world.dearest(tuple(found.model for found in candidates))
    assert status == 200
    last = row["attempt_rows"][-1]
    if thinking:
        assert b"[DONE]" not in raw
        assert (row["outcome"], last["outcome"]) == ("error", "cut")
        return
    chunks = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    said = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(said) == ANSWER
    assert raw.endswith(b"data: [DONE]\n\n")
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert (row["outcome"], row["degraded"]) == ("ok", "resumed")
    assert (last["model"], last["kind"], last["outcome"]) == ("weak", "resume", "ok")
    usage = chunks[-1]["usage"]
    told = usage["completion_tokens"]
    assert last["output_tokens"] < told, "what the plan had told counts, too"
    written = sum(attempt["output_tokens"] + attempt["reasoning_tokens"] for attempt in row["attempt_rows"])
    assert told + chunks[-1]["leadline"]["plan"]["discarded_tokens"] == written
    assert usage["total_tokens"] == usage["prompt_tokens"] + told
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert thought > 0
    read = Usage(usage["prompt_tokens"], output=told - thought, reasoning=thought)
    assert row["baseline_nanousd"] == cost_nanousd(dearest, read)


async def test_an_answer_that_its_caller_has_begun_is_gone_on_with_as_it_is(far: Reasoner, tmp_path: Path) -> None:
    body = ask()
    body["messages"].append({"role": "assistant", "content": "<think>\n</think>\n\nThe answer", "prefix": True})
    async with running(stepping(far), tmp_path / "home") as gateway:
        status, _, answer = await gateway.chat(body)
        row = (await gateway.rows())[0]
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == ANSWER.removeprefix("The answer")
    assert [a["kind"] for a in row["attempt_rows"]] == ["first"]


@pytest.mark.parametrize("silent", ["draft", "base"])
async def test_who_writes_nothing_is_not_asked_for_step_after_step(far: Reasoner, tmp_path: Path, silent: str) -> None:
    nothing = saying({"content": ""}, 4)
    far.minds["draft"] = Mind([BAD] * 6)
    far.hooks[silent] = [nothing] if silent == "draft" else [None, nothing]
    async with running(stepping(far), tmp_path / "home") as gateway:
        assert (await told(gateway, stream=True))[:2] == (RIGHT.rstrip("\n") + "\n\n", ANSWER)
        row = (await gateway.rows())[0]
    kinds = [a["kind"] for a in row["attempt_rows"]]
    assert kinds == (["draft", "think"] if silent == "draft" else ["draft", "verify", "step", "think"])
