"""A vLLM is asked for the prompts that it makes; what becomes of a thought where it does not tell them."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from gateway.edge.wire import read_chat
from gateway.upstream import prompts
from gateway.upstream.http import HttpClient
from gateway.upstream.prompts import Prompts
from gateway.upstream.raw_thought import has_text
from gateway.upstream.types import CallHeaders, ChatCall, Target, UpstreamError
from local_engine.types import ThoughtSoFar
from tests.gateway.conftest import running
from tests.gateway.reasoner import ANSWER, Reasoner
from tests.gateway.test_stepping import POLICY, RIGHT, told

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


@pytest.fixture
def asked(far: Reasoner, client: HttpClient) -> Prompts:
    return Prompts(client, "far", far.url.removesuffix("/v1"), [("Content-Type", "application/json")])


def target(model: str, timeout_s: float = 10.0) -> Target:
    return Target(model, "far", model, None, 1000, 100, timeout_s, 0, prefix="vllm")


def call(**fields: object) -> ChatCall:
    body = {"model": "m", "messages": [{"role": "user", "content": "Q"}], **fields}
    return msgspec.structs.replace(
        read_chat(json.dumps(body).encode(), CallHeaders(token="")), thought=ThoughtSoFar("One.")
    )


def times(far: Reasoner) -> int:
    assert far.raw is not None
    return len(far.raw.conversations)


async def test_its_connection_serves_again(far: Reasoner, client: HttpClient, asked: Prompts) -> None:
    for _ in range(3):
        assert await asked.as_text(target("base"), call()) is not None
    assert (client.statistics().open, client.statistics().in_use) == (1, 0)
    assert times(far) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_model_whose_prompts_are_not_served_is_asked_for_none_for_a_while(
    far: Reasoner, asked: Prompts, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Others of the server are: it may not have this one, or a proxy let nobody through for a moment."""
    assert far.raw is not None
    far.raw.statuses["base"] = status
    with capture_logs() as lines:
        for _ in range(2):
            assert await asked.as_text(target("base"), call()) is None
    assert times(far) == 1
    assert [(line["event"], line["why"]) for line in lines] == [("upstream.prompt_untold", f"it answered {status}")]
    assert await asked.as_text(target("draft"), call()) is not None
    monkeypatch.setattr(prompts, "UNTOLD_FOR_S", 0.0)
    fresh = Prompts(asked._client, "far", far.url.removesuffix("/v1"), [])
    assert await fresh.as_text(target("base"), call()) is None
    del far.raw.statuses["base"]
    assert await fresh.as_text(target("base"), call()) is not None


@pytest.mark.parametrize(("status", "cause"), [(429, "rate_limit"), (500, "status"), (503, "status")])
async def test_a_server_that_is_busy_or_fails_is_no_server_without_prompts(
    far: Reasoner, client: HttpClient, asked: Prompts, status: int, cause: str
) -> None:
    assert far.raw is not None
    far.raw.statuses["base"] = status
    with pytest.raises(UpstreamError, match="not now") as failed:
        await asked.as_text(target("base"), call())
    assert (failed.value.cause, failed.value.may_be_billed) == (cause, False)
    far.raw.statuses.clear()
    assert await asked.as_text(target("base"), call()) is not None
    assert client.statistics().in_use == 0


async def test_a_conversation_that_it_refuses_goes_to_its_chat(far: Reasoner, asked: Prompts) -> None:
    """Which says why, to whom it belongs."""
    assert far.raw is not None
    far.raw.statuses["base"] = 400
    assert await asked.as_text(target("base"), call()) is None
    far.raw.statuses.clear()
    assert await asked.as_text(target("base"), call()) is not None


@pytest.mark.parametrize(("within_s", "timeout_s"), [(1.0, 10.0), (5.0, 2.0)], ids=["long", "as its attempt"])
async def test_a_prompt_that_takes_too_long_is_not_waited_for(
    far: Reasoner,
    client: HttpClient,
    asked: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    within_s: float,
    timeout_s: float,
) -> None:
    assert far.raw is not None
    assert await asked.as_text(target("draft"), call()) is not None  # connected: what is asked goes out at once
    monkeypatch.setattr(prompts, "WITHIN_S", within_s)
    far.raw.hold.clear()
    for _ in range(2):
        assert await asked.as_text(target("base", timeout_s), call()) is None
    assert times(far) == 2
    assert client.statistics().in_use == 0


async def test_a_server_that_is_away_costs_nothing(client: HttpClient) -> None:
    with pytest.raises(UpstreamError, match="cannot be reached") as failed:
        await Prompts(client, "far", "http://127.0.0.1:9", []).as_text(target("base"), call())
    assert (failed.value.cause, failed.value.may_be_billed) == ("connect", False)


def test_what_a_text_would_not_say_stays_a_chat() -> None:
    assert has_text(call())
    assert has_text(call(echo=False, documents=None))
    assert not has_text(call(echo=True))
    assert not has_text(call(documents=[{"text": "D"}]))


async def test_raw_text_is_told_whose_it_is_how_urgent_and_to_count(far: Reasoner, tmp_path: Path) -> None:
    policy = POLICY.format(url=far.url, server="vllm, priority_scheduling: true", plan="method: specreason", base="")
    policy = policy.replace("name: think,", "name: think, priority: 3,")
    async with running(policy, tmp_path / "home") as gateway:
        assert (await told(gateway, stream=True, model="think"))[:2] == (RIGHT, ANSWER)
    assert all(body["raw"] for body in far.bodies)
    assert all(len(body["cache_salt"]) > 20 for body in far.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in far.bodies)
    assert {body["model"]: body.get("priority") for body in far.bodies} == {"base": -3, "draft": None}
