"""A remote thought that is left before its end: where, what was seen of it, and what it cost."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from routers.errors import PolicyError
from routers.load import parse
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.reasoner import ANSWER, Mind, Reasoner, failing
from tests.gateway.test_stepping import ask, told

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  far: {{base_url: "{url}", timeout: 30s, retries: 0, breaker: off, server: vllm}}
models:
  strong: {{provider: far, model: base, context: 16000, max_output: 2000, prefix: {prefix}, logprobs: {logprobs},
           price: {{input: $2.50/Mtok, cached_input: $0.25/Mtok, output: $10/Mtok}},
           plan: {{exit: {{{plan}}}}}}}
"""
PASSES = ["So far it comes to 42."] + [f"Wait let me check that in way {word}: it is 42." for word in "abcdefgh"]
LONG = Mind(PASSES, answer="The answer is 42.")


@pytest.fixture
async def far() -> AsyncIterator[Reasoner]:
    upstream = await Reasoner({"base": LONG}, pace_s=0.002).start()
    yield upstream
    await upstream.stop()


def start(far: Reasoner, home: Path, plan: str, prefix: str = "true") -> AbstractAsyncContextManager[Gateway]:
    return running(POLICY.format(url=far.url, plan=plan, prefix=prefix, logprobs="true"), home)


async def one(gateway: Gateway) -> dict[str, Any]:
    return (await gateway.rows())[0]


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("separates", [True, False], ids=["separated", "tagged"])
async def test_two_passes_that_come_to_the_same_end_the_thought_before_its_cue(
    far: Reasoner, tmp_path: Path, separates: bool, stream: bool, together: int
) -> None:
    far.together = together
    far.minds["base"] = Mind(PASSES, answer="The answer is 42.", separates=separates)
    async with start(far, tmp_path / "home", "rule: redundancy") as gateway:
        thought, answer, usage, plan = await told(gateway, stream=stream)
        await until(lambda: far.left)
        row = await one(gateway)
    assert thought.strip() == "\n\n".join(PASSES[:2]), "nobody sees the cue of a pass that is cut off"
    assert answer == "The answer is 42."
    assert (plan["kind"], plan["by"]) == ("exit", "redundancy")
    left, answered = row["attempt_rows"]
    assert [(a["kind"], a["outcome"]) for a in (left, answered)] == [("think", "left"), ("answer", "ok")]
    assert left["cost_estimated"]
    assert not answered["cost_estimated"]
    assert answered["cost_nanousd"] == far.truth[-1].nanousd
    assert far.truth[0].completion < len(" ".join(PASSES).split()) / 2, "the rest was never written"
    assert usage["completion_tokens"] < 40
    assert row["outcome"] == "ok"


async def test_forced_answers_that_agree_end_the_thought(far: Reasoner, tmp_path: Path) -> None:
    async with start(far, tmp_path / "home", "rule: convergence, agree: 2") as gateway:
        thought, answer, _, plan = await told(gateway, stream=True)
        row = await one(gateway)
    assert answer == "The answer is 42."
    assert plan["by"] == "convergence"
    assert thought.count("Wait") < len(PASSES) - 1
    kinds = [a["kind"] for a in row["attempt_rows"]]
    assert kinds[0] == "think"
    assert kinds[-1] == "answer"
    assert kinds.count("verify") == int(plan["looks"]) >= 2
    looks = [a["cost_nanousd"] for a in row["attempt_rows"] if a["kind"] == "verify"]
    assert all(cost in [bill.nanousd for bill in far.truth] for cost in looks)


@pytest.mark.parametrize(
    ("rule", "by"),
    [("rule: budget, budget: 15", "budget"), ("rule: redundancy, agree: 9, max_thinking_tokens: 20", "limit")],
)
@pytest.mark.parametrize("together", [1, 5])
async def test_a_budget_and_a_limit_close_the_thought(
    far: Reasoner, tmp_path: Path, rule: str, by: str, together: int
) -> None:
    far.together = together
    async with start(far, tmp_path / "home", rule) as gateway:
        thought, answer, usage, did = await told(gateway, stream=True)
    assert (answer, did["by"]) == ("The answer is 42.", by)
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= 24
    assert len(thought.split()) <= 24


async def test_steps_none_of_which_stands_out_end_the_thought_at_a_cue(far: Reasoner, tmp_path: Path) -> None:
    async with start(far, tmp_path / "home", "rule: momentum") as gateway:
        _, answer, _, plan = await told(gateway, stream=True)
    assert (answer, plan["by"]) == ("The answer is 42.", "momentum")
    assert far.bodies[0]["logprobs"] is True
    assert "logprobs" not in far.bodies[-1]


async def test_an_endless_loop_of_wait_is_left(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(["Wait, once more from the start."] * 200, closes=False)
    async with start(far, tmp_path / "home", "rule: redundancy, agree: 9") as gateway:
        thought, answer, _, plan = await told(gateway, stream=True)
    assert answer == ANSWER
    assert plan["by"] in ("repeats", "loop", "redundancy")
    assert thought.count("Wait") < 20


async def test_a_thought_that_ends_by_itself_is_one_call(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(["It is 42."])
    async with start(far, tmp_path / "home", "rule: redundancy") as gateway:
        thought, answer, usage, plan = await told(gateway, stream=True)
        (attempt,) = (await one(gateway))["attempt_rows"]
    assert (thought.strip(), answer) == ("It is 42.", ANSWER)
    assert "by" not in plan
    assert attempt["cost_nanousd"] == far.truth[0].nanousd
    assert usage["completion_tokens"] == far.truth[0].completion


async def test_a_model_that_does_not_think_answers_as_ever(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(tags=False, separates=False)
    async with start(far, tmp_path / "home", "rule: redundancy") as gateway:
        thought, answer, usage, plan = await told(gateway, stream=True)
        (attempt,) = (await one(gateway))["attempt_rows"]
    assert (thought, answer) == ("", ANSWER)
    assert "by" not in plan
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    assert attempt["cost_nanousd"] == far.truth[0].nanousd


async def test_one_that_stops_in_its_thought_is_closed_for(far: Reasoner, tmp_path: Path) -> None:
    far.minds["base"] = Mind(["It may be 42."], closes=False)
    async with start(far, tmp_path / "home", "rule: redundancy") as gateway:
        _, answer, _, plan = await told(gateway, stream=False)
    assert (answer, plan["by"]) == (ANSWER, "unclosed")


async def test_who_leaves_pays_for_what_was_written(far: Reasoner, tmp_path: Path) -> None:
    far.pace_s = 0.05
    async with start(far, tmp_path / "home", "rule: redundancy, agree: 9") as gateway:
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions", json={**ask(), "stream": True}, headers=gateway.headers()
        ) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        await until(lambda: far.left)
        await until(lambda: not gateway.app.state.lifecycle.metrics.in_flight.value)
        row = await one(gateway)
    assert row["outcome"] == "cancelled"
    assert [(a["kind"], a["outcome"]) for a in row["attempt_rows"]] == [("think", "cancelled")]


async def test_an_answer_that_cannot_be_had_after_the_cut_ends_as_an_error(far: Reasoner, tmp_path: Path) -> None:
    far.hooks["base"] = [None, failing]
    async with start(far, tmp_path / "home", "rule: redundancy") as gateway:
        _, _, raw = await gateway.stream(ask())
        row = await one(gateway)
    assert b"[DONE]" not in raw
    assert row["outcome"] == "error"
    assert [a["outcome"] for a in row["attempt_rows"]] == ["left", "status"]


def test_momentum_needs_log_probabilities_and_all_exits_a_prefix() -> None:
    with pytest.raises(PolicyError, match="momentum reads log probabilities"):
        parse(POLICY.format(url="http://h/v1", plan="rule: momentum", prefix="true", logprobs="false"))
    with pytest.raises(PolicyError, match="does not go on from the start of an answer"):
        parse(POLICY.format(url="http://h/v1", plan="rule: redundancy", prefix="false", logprobs="true"))
