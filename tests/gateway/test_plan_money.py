"""What plans over calls cost: each token that anybody wrote is in a row, priced, and told or counted as thrown away."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway import test_leaving, test_stepping
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.reasoner import ANSWER, BAD, STEPS, Mind, Reasoner, dying_after, reset, saying
from tests.gateway.test_leaving import PASSES
from tests.gateway.test_stepping import ask, told
from tests.serving import begin_events, event

pytestmark = pytest.mark.anyio

BUDGET = 'limits: [{key: "*", budget: $10/day}]\n'


def leaving(far: Reasoner, plan: str) -> str:
    return test_leaving.POLICY.format(url=far.url, plan=plan, prefix="true", logprobs="true") + BUDGET


def stepping(far: Reasoner, plan: str = "method: specreason") -> str:
    return test_stepping.POLICY.format(url=far.url, server="vllm", plan=plan, base="") + BUDGET


async def last(gateway: Gateway) -> dict[str, Any]:
    """The newest row: it costs what its attempts cost, no more than was held, and that is what was booked."""
    rows = await gateway.rows()
    (budget,) = gateway.app.state.lifecycle.budgets.all()
    assert (budget.spent_nanousd, budget.reserved_nanousd) == (sum(row["cost_nanousd"] for row in rows), 0)
    row = rows[0]
    assert row["cost_nanousd"] == sum(a["cost_nanousd"] for a in row["attempt_rows"]) <= row["reserved_nanousd"]
    return row


def written(row: dict[str, Any]) -> int:
    return sum(a["output_tokens"] + a["reasoning_tokens"] for a in row["attempt_rows"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("words", [0, 5], ids=["unanswered", "midway"])
async def test_a_draft_that_dies_is_billed_for_what_it_wrote(
    far: Reasoner, tmp_path: Path, words: int, stream: bool
) -> None:
    far.hooks["draft"] = [None, None, dying_after(words) if words else reset]
    async with running(stepping(far), tmp_path / "home") as gateway:
        _, answer, _, plan = await told(gateway, stream=stream)
        row = await last(gateway)
    assert (answer, plan["degraded"]) == (ANSWER, "draft_failed")
    dead = row["attempt_rows"][4]
    assert (dead["model"], dead["outcome"], dead["cost_estimated"]) == ("weak", "cut", True)
    assert words <= dead["output_tokens"] + dead["reasoning_tokens"] <= 2 * words
    assert dead["input_tokens"] < len(json.dumps(far.bodies[4])) / 2, "not as if each byte of its prompt were a token"


async def test_who_leaves_while_a_draft_writes_pays_for_what_it_wrote(far: Reasoner, tmp_path: Path) -> None:
    async def stall(upstream: Reasoner, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await begin_events(request)
        for word in ("So", " it", " is"):
            choice = {"index": 0, "delta": {"reasoning_content": word}, "finish_reason": None}
            await response.write(event({"choices": [choice]}))
        writing.set()
        try:
            await asyncio.sleep(3600)
        finally:
            upstream.left += 1
        raise AssertionError

    writing = asyncio.Event()
    far.hooks["draft"] = [None, stall]
    async with running(stepping(far), tmp_path / "home") as gateway:
        asking = asyncio.create_task(gateway.chat(ask()))
        await writing.wait()
        lifecycle = gateway.app.state.lifecycle
        (ticket_budget,) = lifecycle.budgets.all()
        held = ticket_budget.reserved_nanousd
        asking.cancel()
        await asyncio.wait((asking,))
        await until(lambda: far.left and not lifecycle.metrics.in_flight.value)
        row = await last(gateway)
    assert row["outcome"] == "cancelled"
    cut = row["attempt_rows"][-1]
    assert (cut["kind"], cut["outcome"]) == ("draft", "cancelled")
    assert cut["output_tokens"] <= 3
    assert cut["cost_nanousd"] < held / 2
    assert json.loads(row["plan"])["discarded_tokens"] == written(row) - 12, "all but the one step that was told"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "plan",
    [
        "method: specreason",
        "method: glimprouter",
        "method: speculative_thinking",
        "method: entropy, threshold: 0.3",
        "method: specreason, max_thinking_tokens: 20",
    ],
)
async def test_every_token_of_a_shared_thought_is_told_or_counted_as_thrown_away(
    far: Reasoner, tmp_path: Path, plan: str, stream: bool
) -> None:
    far.minds["draft"] = Mind([STEPS[0], BAD, *STEPS[2:4], "Wait, is that so?", STEPS[5]], unsure=frozenset({1, 3}))
    async with running(stepping(far, plan), tmp_path / "home") as gateway:
        _, _, usage, did = await told(gateway, stream=stream)
        row = await last(gateway)
    assert written(row) == sum(bill.completion for bill in far.truth)
    assert written(row) == usage["completion_tokens"] + int(did.get("discarded_tokens", 0))
    assert row["cost_nanousd"] == sum(bill.nanousd for bill in far.truth)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "rule",
    ["rule: redundancy", "rule: convergence, agree: 2", "rule: budget, budget: 15", "rule: redundancy, agree: 9"],
)
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "unclosed"])
async def test_every_token_of_a_thought_that_is_left_is_told_or_counted_as_thrown_away(
    far: Reasoner, tmp_path: Path, rule: str, closes: bool, stream: bool
) -> None:
    far.minds["base"] = Mind(PASSES, answer="The answer is 42.", closes=closes)
    far.pace_s = 0.002
    async with running(leaving(far, rule), tmp_path / "home") as gateway:
        _, _, usage, did = await told(gateway, stream=stream)
        row = await last(gateway)
    assert written(row) == usage["completion_tokens"] + int(did.get("discarded_tokens", 0))
    told_by_it = [a for a in row["attempt_rows"] if not a["cost_estimated"]]
    bills = [bill.nanousd for bill in far.truth]
    assert all(a["cost_nanousd"] in bills for a in told_by_it)
    assert len(row["attempt_rows"]) - len(told_by_it) == (did.get("by") in ("redundancy", "convergence", "budget"))


@pytest.mark.parametrize(("question", "left"), [(40, True), (1500, False)])
async def test_a_thought_is_not_left_where_reading_it_again_costs_more_than_all_that_may_follow(
    far: Reasoner, tmp_path: Path, question: int, left: bool
) -> None:
    far.minds["base"] = Mind(PASSES[:4], answer="The answer is 42.")
    far.pace_s = 0.002
    asked = {"messages": [{"role": "user", "content": " ".join(f"word{n}" for n in range(question))}]}
    async with running(leaving(far, "rule: redundancy"), tmp_path / "home") as gateway:
        _, answer, _, did = await told(gateway, stream=True, max_tokens=200, **asked)
        row = await last(gateway)
    assert answer == "The answer is 42."
    assert did.get("by") == ("redundancy" if left else None)
    assert [a["kind"] for a in row["attempt_rows"]] == (["think", "answer"] if left else ["think"])


@pytest.mark.parametrize("method", ["specreason", "glimprouter"])
async def test_a_draft_that_answers_in_place_of_a_step_is_counted(far: Reasoner, tmp_path: Path, method: str) -> None:
    far.hooks["draft"] = [None, None, saying({"content": "It is as I have said, forty two."}, 10, reason="stop")]
    async with running(stepping(far, f"method: {method}"), tmp_path / "home") as gateway:
        _, answer, usage, did = await told(gateway, stream=False)
        row = await last(gateway)
    assert answer == ANSWER
    assert written(row) == sum(bill.completion for bill in far.truth)
    assert written(row) == usage["completion_tokens"] + int(did["discarded_tokens"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("room", [560, 620, 700])
async def test_a_shared_thought_that_fills_the_context_ends_by_its_length(
    far: Reasoner, tmp_path: Path, room: int, stream: bool
) -> None:
    """Its steps are asked for with up to 512 tokens each, which is more than is left from the second on."""
    steps = [f"Step {n} " + " ".join(f"word{n}x{m}" for m in range(60)) + "." for n in range(20)]
    far.minds["base"] = Mind(steps)
    far.minds["draft"] = Mind([*steps[:2], *[BAD] * 18])
    far.context = 45 + room
    policy = stepping(far).replace("context: 16000, max_output: 2000", f"context: {far.context}")
    async with running(policy, tmp_path / "home") as gateway:
        if stream:
            status, _, raw = await gateway.stream(ask())
            assert raw.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in raw
        else:
            status, _, body = await gateway.chat(ask())
            assert body["choices"][0]["finish_reason"] == "length"
            thought = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert thought > room / 2
        row = await last(gateway)
    assert (status, row["outcome"]) == (200, "ok")
    assert "step" in {a["kind"] for a in row["attempt_rows"]}


@pytest.mark.parametrize("room", [0, 200], ids=["less", "enough"])
async def test_an_answer_after_a_cut_gets_what_room_there_is(far: Reasoner, tmp_path: Path, room: int) -> None:
    """The tags that close the thought are in the prompt of the answer, and nobody had reckoned with them."""
    far.minds["base"] = Mind(PASSES, answer="The answer is " + " and ".join(str(n) for n in range(80)))
    far.pace_s = 0.002
    async with running(leaving(far, "rule: momentum"), tmp_path / "home") as gateway:
        await gateway.stream(ask(max_tokens=100))
        far.context = far.truth[0].prompt + 100 + room
        status, _, raw = await gateway.stream(ask(max_tokens=100, seed=1))
        row = await last(gateway)
    assert (status, row["outcome"]) == (200, "ok")
    assert b'"finish_reason":"length"' in raw
    assert b'" answer"' in raw
    assert [a["kind"] for a in row["attempt_rows"]].count("answer") == (1 if room else 2)
