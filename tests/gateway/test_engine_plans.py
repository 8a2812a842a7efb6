"""Plans of the local engine, from the policy to the ledger: who wrote what, what it cost, and what is told of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from sqlmodel import Session, select

from gateway.ledger.tables import RequestRow
from gateway.upstream.http import HttpClient
from gateway.world import build_world, engine_plan
from local_engine.arithmetic import problems
from local_engine.client import EngineClient
from local_engine.plan_types import AcceptRule, Cascade, Exit, SpeculateSteps, Vote
from routers.decide import decide
from routers.errors import PolicyError
from routers.explain import to_lines
from routers.load import parse
from routers.schema import AcceptRuleFile, CascadePlanFile, ExitFile, SpeculateFile, VoteFile
from routers.types import Query, Signals, State
from tests.gateway.conftest import Gateway, running

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]

POLICY = """
version: 1
providers:
  home: {engine: embedded}
models:
  local: {provider: home, model: bundled/base, context: 1024, price: {input: $1/Mtok, output: $10/Mtok}}
  small: {provider: home, model: bundled/draft, context: 1024, price: {input: $0.1/Mtok, output: $1/Mtok}}
  quick:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $1/Mtok, output: $10/Mtok}
    plan: {speculate: {draft: small}}
  apart:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $0/Mtok, output: $10/Mtok, reasoning: $1/Mtok}
    plan: {speculate: {draft: told}}
  told:
    provider: home
    model: bundled/draft
    context: 1024
    price: {input: $0/Mtok, output: $1/Mtok, reasoning: $10/Mtok}
  brief:
    provider: home
    model: bundled/base
    context: 1024
    price: free
    plan: {exit: {rule: convergence, agree: 2}}
  sure:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $1/Mtok, output: $10/Mtok}
    plan: {vote: {most: 5}}
  first:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $1/Mtok, output: $10/Mtok}
    plan: {cascade: {draft: small, accept: {weights: {mean_logprob: 1}, bias: 0, at_least: 0.4}}}
  never:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $1/Mtok, output: $10/Mtok}
    plan: {cascade: {draft: small, accept: {weights: {mean_logprob: 1}, bias: -30, at_least: 0.5}}}
  both:
    provider: home
    model: bundled/base
    context: 1024
    price: free
    plan: {vote: {most: 3, exit: {rule: convergence}}}
  deep:
    provider: home
    model: bundled/base
    context: 1024
    price: {input: $1/Mtok, output: $10/Mtok}
    plans: {high: {speculate: {draft: small}}}
routes:
  - {name: hard, when: {model: hard}, candidates: [deep, local], objective: cheapest, effort: high, cache: off,
     affinity: {}}
limits: [{key: "*", budget: $1/day}]
"""
QUESTION = problems(20, 3, 1)[0].question


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with running(POLICY, tmp_path_factory.mktemp("plans") / "home") as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(200):
            await gateway.app.engine.ready.wait()
        yield gateway


class NoEngine:
    client: EngineClient | None = None


def ask(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}


def told(headers: Any) -> tuple[str, dict[str, str]]:
    kind, *counts = headers["x-leadline-plan"].split("; ")
    return kind, dict(count.split("=", 1) for count in counts)


async def test_a_smaller_model_writes_and_each_model_is_billed_for_what_it_did(home: Gateway) -> None:
    status, headers, answer = await home.chat(ask("quick"))
    assert status == 200
    kind, counts = told(headers)
    assert kind == "speculate"
    assert 0 < int(counts["accepted_steps"]) <= int(counts["drafted_steps"])
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"]
    row = (await home.rows())[0]
    own, draft = row["attempt_rows"]
    assert (own["model"], own["kind"], draft["model"], draft["kind"]) == ("quick", "first", "small", "draft")
    assert own["cost_nanousd"] == 1000 * own["input_tokens"] + 10_000 * (own["output_tokens"] + own["reasoning_tokens"])
    drafted = draft["output_tokens"] + draft["reasoning_tokens"]
    assert drafted == int(counts["drafted_tokens"])
    assert draft["cost_nanousd"] == 100 * draft["input_tokens"] + 1000 * drafted > 0
    assert row["cost_nanousd"] == own["cost_nanousd"] + draft["cost_nanousd"] == int(headers["x-leadline-cost-nanousd"])
    assert row["cost_nanousd"] <= row["reserved_nanousd"]
    usage = answer["usage"]
    written = own["output_tokens"] + own["reasoning_tokens"]
    assert written < usage["completion_tokens"], "most of the thought was accepted, not written again"


async def test_thoughts_and_answers_are_billed_as_what_they_are(home: Gateway) -> None:
    _, headers, answer = await home.chat(ask("apart", max_tokens=200))
    row = (await home.rows())[0]
    own, draft = row["attempt_rows"]
    thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    shown = answer["usage"]["completion_tokens"] - thought
    discarded = int(told(headers)[1].get("discarded_tokens", 0))
    answers, thoughts = (own[kind] + draft[kind] for kind in ("output_tokens", "reasoning_tokens"))
    assert shown <= answers <= shown + discarded
    assert thought <= thoughts <= thought + discarded
    assert answers + thoughts == shown + thought + discarded, "what was written, nothing twice"
    assert draft["reasoning_tokens"] > 0
    assert draft["output_tokens"] > 0, "it wrote of the answer, too"
    assert own["cost_nanousd"] == 10_000 * own["output_tokens"] + 1000 * own["reasoning_tokens"]
    assert draft["cost_nanousd"] == 1000 * draft["output_tokens"] + 10_000 * draft["reasoning_tokens"]
    assert row["reserved_nanousd"] == 2 * 200 * (10_000 + 10_000), "each at its own dearest class"


async def test_the_plan_of_an_effort_that_the_policy_decides_is_held_for_and_billed(home: Gateway) -> None:
    status, headers, _ = await home.chat(ask("hard", max_tokens=200))
    assert (status, told(headers)[0]) == (200, "speculate")
    row = (await home.rows())[0]
    assert [(a["model"], a["kind"]) for a in row["attempt_rows"]] == [("deep", "first"), ("small", "draft")]
    plain = (await home.chat(ask("local", max_tokens=200)))[1]
    assert plain.get("x-leadline-plan") is None
    alone = (await home.rows())[0]
    assert row["reserved_nanousd"] > 2 * 200 * 10_000 > alone["reserved_nanousd"]


@pytest.mark.parametrize("model", ["quick", "sure", "hard"])
async def test_explain_counts_all_that_a_plan_may_be_billed(home: Gateway, model: str) -> None:
    asked = ask(model, max_tokens=16) | {"temperature": 0.7}
    async with home.session.post(f"{home.url}/leadline/v1/explain", json=asked, headers=home.headers()) as response:
        bound = (await response.json())["decision"]["worst_case_nanousd"]
    await home.chat(asked)
    row = (await home.rows())[0]
    attempts = 1 + home.app.state.lifecycle.world.targets[row["model_served"]].retries
    assert bound >= attempts * row["reserved_nanousd"] > 0


async def test_a_conversation_goes_on_with_who_answered_and_not_with_its_draft(home: Gateway) -> None:
    for _ in range(2):
        await home.chat(ask("hard", max_tokens=200), **{"x-session-id": "one"})
    again, first = (await home.rows())[:2]
    assert [attempt["model"] for attempt in first["attempt_rows"]] == ["deep", "small"]
    with Session(home.app.state.lifecycle.ledger.engine) as session:
        facts = session.exec(select(RequestRow.facts).where(RequestRow.id == again["id"])).one()
    assert json.loads(facts or "{}")["last"] == "deep"


async def test_a_streamed_plan_costs_and_tells_what_a_whole_one_does(home: Gateway) -> None:
    _, headers, whole = await home.chat(ask("quick", seed=1))
    _, _, raw = await home.stream(ask("quick", seed=2, stream_options={"include_usage": True}))
    lines = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    reasoning = "".join(c["choices"][0]["delta"].get("reasoning_content", "") for c in chunks if c["choices"])
    assert reasoning == whole["choices"][0]["message"]["reasoning_content"]
    extension = chunks[-1]["leadline"]
    assert extension["cost_nanousd"] > 0
    kind, counts = told(headers)
    assert extension["plan"]["kind"] == kind
    assert extension["plan"]["accepted_steps"] == int(counts["accepted_steps"])


async def test_a_thought_left_early_says_by_what_rule(home: Gateway) -> None:
    status, headers, answer = await home.chat(ask("brief", reasoning_effort="high"))
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    kind, counts = told(headers)
    assert kind == "exit"
    assert counts.get("by", "convergence") == "convergence"
    (attempt,) = (await home.rows())[0]["attempt_rows"]
    assert (attempt["model"], attempt["kind"]) == ("brief", "first")


async def test_a_vote_is_billed_for_all_of_its_samples(home: Gateway) -> None:
    status, headers, answer = await home.chat(ask("sure", temperature=0.7, seed=1, max_tokens=200))
    assert status == 200
    assert answer["choices"][0]["message"]["content"].startswith("The answer is")
    kind, counts = told(headers)
    assert kind == "vote"
    assert 3 <= int(counts["samples"]) <= 5
    assert int(counts["agree"]) >= 1
    plain = (await home.chat(ask("local", temperature=0.7, seed=1, max_tokens=200)))[2]
    assert answer["usage"]["completion_tokens"] > 2 * plain["usage"]["completion_tokens"]
    (attempt,) = (await home.rows())[1]["attempt_rows"]
    output = answer["usage"]["completion_tokens"] * 10_000
    assert attempt["cost_nanousd"] >= output, "every token of every sample"
    _, headers, _ = await home.chat(ask("sure", temperature=0, max_tokens=200))
    assert told(headers) == ("none", {"reason": "temperature"}), "samples that cannot differ are not drawn"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cascade_answers_by_its_draft_or_escalates_and_bills_both(home: Gateway, stream: bool) -> None:
    told_plans = {}
    for model in ("first", "never"):
        if stream:
            _, _, raw = await home.stream(ask(model, seed=7, stream_options={"include_usage": True}))
            last = [line for line in raw.decode().splitlines() if line.startswith("data: {")][-1]
            told_plans[model] = json.loads(last.removeprefix("data: "))["leadline"]["plan"]
        else:
            _, headers, answer = await home.chat(ask(model))
            assert answer["choices"][0]["message"]["content"]
            kind, counts = told(headers)
            told_plans[model] = {"kind": kind, **counts}
        row = (await home.rows())[0]
        own, draft = row["attempt_rows"]
        assert (own["model"], draft["model"], draft["kind"]) == (model, "small", "draft")
        read = draft["input_tokens"] + draft["cached_input_tokens"]
        drafted = draft["output_tokens"] + draft["reasoning_tokens"]
        assert draft["cost_nanousd"] == 100 * read + 1000 * drafted > 0
        assert draft["output_tokens"] > 0, "it answered, whether or not anybody was told"
        if not stream:
            assert read == answer["usage"]["prompt_tokens"], "read once, whatever was guessed of its answer"
        assert (own["output_tokens"] > 0) == (model == "never"), "who was not asked wrote nothing"
    assert {plan["kind"] for plan in told_plans.values()} == {"cascade"}
    assert "escalated" not in told_plans["first"]
    assert int(told_plans["never"]["escalated"]) == 1


async def test_the_samples_of_a_vote_leave_their_thoughts(home: Gateway) -> None:
    status, headers, answer = await home.chat(ask("both", temperature=0.7, seed=1, max_tokens=300))
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    assert told(headers)[0] == "vote"


async def test_what_no_plan_is_for_runs_without(home: Gateway) -> None:
    status, headers, _ = await home.chat(ask("quick", logprobs=True, max_tokens=8))
    assert status == 200
    assert told(headers) == ("none", {"reason": "logprobs"})
    (attempt,) = (await home.rows())[0]["attempt_rows"]
    assert attempt["kind"] == "first"
    begun = {"role": "assistant", "content": "", "reasoning_content": "Let me"}
    asked = ask("quick", continue_final_message=True, max_tokens=8)
    status, headers, _ = await home.chat({**asked, "messages": [*asked["messages"], begun]})
    assert status == 200
    assert told(headers) == ("none", {"reason": "prefix"})


def test_every_name_of_a_model_is_away_with_its_engine() -> None:
    world = build_world(parse(POLICY), HttpClient(), NoEngine(), b"salt")
    assert set(world.unavailable()) == {
        "local", "small", "quick", "apart", "told", "brief", "sure", "first", "never", "both", "deep",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ("{exit: {}, speculate: {draft: small}}", "not one way to spend compute"),
        ("{}", "not one way to spend compute"),
        ("{speculate: {draft: smal}}", "did you mean"),
        ("{speculate: {draft: quick}}", "the model itself"),
        ("{speculate: {draft: remote}}", "`score` reads both models' tokens within one engine"),
        ("{cascade: {draft: remote, accept: {weights: {log_tokens: 1}, bias: 0, at_least: 0.5}}}", "same engine"),
        ("{speculate: {draft: small, method: guess}}", "specreason"),
        ("{speculate: {draft: unpriced}}", "has no price, and quick has one"),
        ("{exit: {}, vote: {}}", "not one way to spend compute"),
        ("{vote: {most: 1}}", "most"),
        ("{vote: {prune: 0.5}}", "prune"),
        ("{exit: {delta: 0.5}}", "5%"),
        ("{cascade: {draft: small, accept: {weights: {log_words: 1}, bias: 0, at_least: 0.5}}}", "log_tokens"),
        (
            "{cascade: {draft: small, accept: {weights: {log_tokens: 1}, bias: 0, at_least: 0.5, go_on_above: 0.1}}}",
            "by what an answer's prospects are judged",
        ),
        ("{vote: {exit: {rule: convergence, gamma: 0.5}}}", "does not read it"),
        ("{exit: {rule: convergence, agree: 1}}", "agree"),
        (
            "{exit: {rule: momentum, delta: 5%}}",
            "plan.exit.delta: `rule: momentum` does not read it (got `5%`)",
        ),
        ("{exit: {rule: budget, agree: 3}}", "or write `rule: convergence` or `redundancy`"),
        ("{exit: {budget: 50}}", "plan.exit.budget: `rule: probe` does not read it (got `50`)"),
        ("{speculate: {draft: small, method: speculative_thinking, threshold: 1}}", "does not read it"),
        ("{speculate: {draft: small, threshold: 9}}", "the log probability of a token against it, which is at most 0"),
        (
            "{speculate: {draft: small, method: specreason, threshold: 9.5}}",
            "a rating against it, which is from 0 to 9",
        ),
        ("{speculate: {draft: small, method: glimprouter, threshold: 4}}", "write a number from 0 to 3"),
        ("{vote: {stop: agreement, bound: 0.5}}", "plan.vote.bound: `stop: agreement` does not read it"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_with_its_place(plan: str, problem: str) -> None:
    remote = "  remote: {provider: far, model: m, price: free}\n"
    remote += "  unpriced: {provider: home, model: bundled/draft, context: 1024, price: unpriced}\n"
    text = POLICY.replace("{speculate: {draft: small}}", plan).replace("  quick:", f"{remote}  quick:")
    with pytest.raises(PolicyError) as caught:
        parse(
            text.replace("  home: {engine: embedded}", '  home: {engine: embedded}\n  far: {base_url: "http://h/v1"}')
        )
    assert problem in str(caught.value)
    assert "models.quick.plan" in str(caught.value)


def test_a_free_model_has_no_draft_that_costs_money() -> None:
    brief = "price: free\n    plan: {exit: {rule: convergence, agree: 2}}"
    with pytest.raises(PolicyError, match="costs money, and brief is free"):
        parse(POLICY.replace(brief, "price: free\n    plan: {speculate: {draft: small}}"))


def test_a_plan_is_for_the_local_engine() -> None:
    text = POLICY.replace("  home: {engine: embedded}", '  home: {base_url: "http://h/v1"}')
    with pytest.raises(PolicyError, match="only the local engine runs vote"):
        parse(text)


def test_every_field_of_a_plan_is_one_of_the_engines() -> None:
    for file, struct in (
        (ExitFile, Exit),
        (SpeculateFile, SpeculateSteps),
        (CascadePlanFile, Cascade),
        (AcceptRuleFile, AcceptRule),
        (VoteFile, Vote),
    ):
        assert set(file.model_fields) <= {field.name for field in msgspec.structs.fields(struct)}
    policy = parse(POLICY)
    assert dict(policy.models["local"].plans) == {}
    plans = dict(policy.models["brief"].plans)
    assert plans.keys() == {"none", "low", "high"}
    assert engine_plan(plans["low"], None) == Exit(rule="convergence")


def test_a_plan_may_be_for_one_effort() -> None:
    text = POLICY.replace(
        "    plan: {exit: {rule: convergence, agree: 2}}", "    plans: {high: {exit: {rule: budget, budget: 9}}}"
    )
    world = build_world(parse(text), HttpClient(), NoEngine(), b"salt")
    assert world.targets["brief"].plans.keys() == {"high"}
    assert world.targets["brief"].plans["high"].plan == Exit(rule="budget", budget=9)
    both = text.replace("    plans: {high:", "    plan: {exit: {rule: momentum}}\n    plans: {high:")
    assert {effort: plan.kind for effort, plan in parse(both).models["brief"].plans} == dict.fromkeys(
        ("none", "low", "high"), "exit"
    )
    with pytest.raises(PolicyError, match=r"models\.quick\.plans\.high"):
        parse(text.replace("    plan: {speculate: {draft: small}}", "    plans: {high: {speculate: {draft: nobody}}}"))


def test_explain_says_what_a_plan_is() -> None:
    policy = parse(POLICY)
    query = Query("quick", "t", input_tokens_estimate=20, input_tokens_max=100, max_output_tokens=50)
    lines = to_lines(decide(query, Signals(), policy, State(), seed=0), (policy, query))
    assert "plan of quick at effort low: speculate: draft small, method score" in lines
