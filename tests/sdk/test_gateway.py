"""The SDK, and plain `openai`, against a real gateway process."""

from decimal import Decimal

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from gateway.sdk import AsyncLeadline, BudgetExceeded, Leadline
from tests.sdk.conftest import COMPLETION_TOKENS, COST_NANOUSD, PROMPT_TOKENS, FakeUpstream

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]


def test_plain_openai_needs_only_the_address(home: tuple[str, str]) -> None:
    base_url, key = home
    with openai.OpenAI(base_url=base_url, api_key=key) as client:
        answer = client.chat.completions.create(model="auto", messages=HELLO)
        assert answer.choices[0].message.content == "Hello."
        with client.chat.completions.create(model="auto", messages=HELLO, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "Hello."


def test_the_receipt_of_an_answer_agrees_with_its_headers(client: Leadline) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=HELLO)
    receipt = client.receipt(raw.parse())
    assert receipt.request_id == raw.headers["x-request-id"]
    assert receipt.model == raw.headers["x-leadline-model"] == "small"
    assert receipt.provider == raw.headers["x-leadline-provider"]
    assert receipt.route == raw.headers["x-leadline-route"] == "auto"
    assert receipt.cost_nanousd == int(raw.headers["x-leadline-cost-nanousd"]) == COST_NANOUSD["small"]
    assert receipt.cost_usd == Decimal(raw.headers["x-leadline-cost"]) == Decimal("0.00003")
    assert (receipt.input_tokens, receipt.output_tokens) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    assert sum(attempt.cost_nanousd or 0 for attempt in receipt.attempts) == receipt.cost_nanousd
    assert (receipt.outcome, receipt.cache, receipt.cost_estimated, receipt.stream) == ("ok", "off", False, False)
    assert receipt == client.receipt(raw) == client.receipt(receipt.request_id)


def test_the_receipt_tells_why(client: Leadline) -> None:
    decision = client.receipt(client.chat.completions.create(model="auto", messages=HELLO)).decision
    assert decision is not None
    assert decision.model == "small"
    assert {candidate.model: bool(candidate.rejected) for candidate in decision.candidates}.keys() == {"small", "large"}
    assert decision.policy_version


def test_the_receipt_of_a_stream_once_it_has_ended(client: Leadline) -> None:
    stream = client.chat.completions.create(model="large", messages=HELLO, stream=True)
    for _ in stream:
        pass
    receipt = client.receipt(stream)
    assert receipt.request_id == stream.response.headers["x-request-id"]
    assert receipt.stream
    assert (receipt.model, receipt.cost_nanousd) == ("large", COST_NANOUSD["large"])


def test_the_receipt_of_a_stream_helper(client: Leadline) -> None:
    with client.chat.completions.stream(model="auto", messages=HELLO) as stream:
        stream.until_done()
        assert client.receipt(stream).cost_nanousd == COST_NANOUSD["small"]


def test_the_receipt_of_an_answer_from_the_cache(client: Leadline) -> None:
    cached = client.with_options(default_headers={"cache-control": ""})
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say it once."}]
    first, again = (cached.receipt(cached.chat.completions.create(model="auto", messages=question)) for _ in range(2))
    assert (first.cache, first.cost_nanousd) == ("miss", COST_NANOUSD["small"])
    assert (again.cache, again.cost_nanousd, again.attempts, again.decision) == ("hit", 0, (), None)
    assert again.model == "small"


def test_a_receipt_that_is_not_there_is_openais_own_error(client: Leadline) -> None:
    with pytest.raises(openai.NotFoundError):
        client.receipt("req_none")


def test_explain_decides_and_runs_nothing(client: Leadline, upstream: FakeUpstream) -> None:
    before = len(upstream.requests), client.spend().requests
    explanation = client.explain("Say hello.")
    assert explanation == client.explain([{"role": "user", "content": "Say hello."}])
    assert explanation.decision.model == "small"
    assert str(explanation).startswith("small, by route auto")
    assert client.explain("Say hello.", tags=["private"]).decision.route == "private"
    assert (len(upstream.requests), client.spend().requests) == before


def test_a_tag_reaches_the_policy(client: Leadline) -> None:
    answer = client.tagged("private").chat.completions.create(model="auto", messages=HELLO)
    assert client.receipt(answer).route == "private"


def test_spend_grows_by_what_a_call_cost(client: Leadline) -> None:
    before = client.spend(hours=1)
    client.chat.completions.create(model="large", messages=HELLO)
    after = client.spend(hours=1)
    assert after.cost_nanousd - before.cost_nanousd == COST_NANOUSD["large"]
    assert after.requests - before.requests == 1
    assert sum(model.cost_nanousd for model in after.by_model) == after.cost_nanousd
    assert after.cost_usd == Decimal(after.cost_nanousd) / 10**9


def test_a_budget_scope_stops_before_it_is_overspent(client: Leadline, upstream: FakeUpstream) -> None:
    limit = Decimal("0.05")
    with client.budget(limit) as scoped:
        before, calls, refused = len(upstream.requests), 0, None
        while refused is None:
            try:
                scoped.chat.completions.create(model="large", messages=HELLO, max_tokens=900)
                calls += 1
            except BudgetExceeded as error:
                refused = error
        assert calls > 0
        assert scoped.spent() == calls * Decimal(COST_NANOUSD["large"]).scaleb(-9) <= limit == scoped.limit_usd
        assert len(upstream.requests) - before == calls, "the refused call ran, or was retried"
    assert isinstance(refused, openai.RateLimitError)
    assert (refused.status_code, refused.code) == (429, "budget_exceeded")
    assert client.receipt(refused).outcome == "refused"
    # Outside of the scope, and after it, the client goes on.
    assert client.chat.completions.create(model="large", messages=HELLO).choices


def test_clients_of_one_scope_share_its_budget(client: Leadline) -> None:
    with client.budget(0.01, name="shared") as one, client.budget("0.01", name="shared") as other:
        one.chat.completions.create(model="large", messages=HELLO, max_tokens=10)
        assert one.spent() == other.spent() == Decimal(COST_NANOUSD["large"]).scaleb(-9)
        assert one.with_options(max_retries=0).scope == "shared"


def test_a_run_and_its_budgets_are_shown(client: Leadline) -> None:
    with client.budget("0.5", name="night/fetch") as scoped:
        answer = scoped.chat.completions.create(model="large", messages=HELLO, max_tokens=10)
        receipt = client.receipt(answer)
        assert (receipt.scope, receipt.team, receipt.degraded) == ("night/fetch", None, None)
        assert [attempt.kind for attempt in receipt.attempts] == ["first"]
    root = str(client.base_url).removesuffix("/v1/")
    budgets = httpx2.get(
        f"{root}/leadline/v1/budgets?scope=night/fetch", headers={"authorization": f"Bearer {client.api_key}"}
    ).json()["data"]
    (run,) = [budget for budget in budgets if budget["label"] == "run:night/fetch"]
    assert (run["limit_nanousd"], run["spent_nanousd"]) == (500_000_000, receipt.cost_nanousd)


@pytest.mark.anyio
async def test_the_asynchronous_twin(async_client: AsyncLeadline) -> None:
    answer = await async_client.chat.completions.create(model="auto", messages=HELLO)
    assert (await async_client.receipt(answer)).cost_nanousd == COST_NANOUSD["small"]
    stream = await async_client.chat.completions.create(model="auto", messages=HELLO, stream=True)
    assert [chunk async for chunk in stream]
    assert (await async_client.receipt(stream)).stream
    assert (await async_client.explain("Hello")).decision.model == "small"
    assert (await async_client.spend()).requests > 0
    tagged = await async_client.tagged("private").chat.completions.create(model="auto", messages=HELLO)
    assert (await async_client.receipt(tagged)).route == "private"


@pytest.mark.anyio
async def test_the_asynchronous_budget_scope(async_client: AsyncLeadline) -> None:
    async with async_client.budget(0.01) as scoped:
        await scoped.chat.completions.create(model="large", messages=HELLO, max_tokens=10)
        with pytest.raises(BudgetExceeded):
            await scoped.chat.completions.create(model="large", messages=HELLO, max_tokens=1000)
        assert await scoped.spent() == Decimal(COST_NANOUSD["large"]).scaleb(-9)
    assert (await async_client.chat.completions.create(model="small", messages=HELLO)).choices
