"""Hints of one request, through a gateway: they narrow what the policy allows, and can do nothing else."""

import pytest

from tests.gateway.conftest import Gateway, StartGateway, ask
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("hints", "model"),
    [
        ({}, "cheap"),
        ({"x-leadline-models": "dear, free"}, "dear"),
        ({"x-leadline-models": "cheap, dear", "x-leadline-max-cost": "9"}, "cheap"),
        ({"x-leadline-effort": "none"}, "cheap"),
    ],
)
async def test_a_hint_narrows_the_choice(gateway: Gateway, hints: dict[str, str], model: str) -> None:
    status, headers, _ = await gateway.chat(ask(model="auto"), **hints)
    assert (status, headers["x-leadline-model"]) == (200, model)


@pytest.mark.parametrize(
    ("hints", "words"),
    [
        ({"x-leadline-models": "free"}, "cheap: "),
        ({"x-leadline-max-cost": "0.000000001"}, "at most $0.000000001"),
        ({"x-leadline-min-quality": "0.9", "x-leadline-models": "gone"}, "cheap: "),
    ],
)
async def test_what_a_hint_leaves_nobody_for_is_refused_with_the_reason(
    gateway: Gateway, upstream: FakeUpstream, hints: dict[str, str], words: str
) -> None:
    status, _, body = await gateway.chat(ask(model="auto"), **hints)
    assert status == 400, body
    assert words in body["error"]["message"]
    assert not upstream.truth


async def test_a_hint_reaches_neither_past_a_route_nor_into_the_cache(gateway: Gateway) -> None:
    """`fragile` offers `gone` and falls back to `cheap`: a hint cannot bring in `free`."""
    status, _, body = await gateway.chat(ask(model="fragile"), **{"x-leadline-models": "free, dear"})
    assert status == 400, body
    _, first, _ = await gateway.chat(ask(model="auto"))
    _, other, _ = await gateway.chat(ask(model="auto"), **{"x-leadline-models": "dear"})
    _, again, _ = await gateway.chat(ask(model="auto"), **{"x-leadline-models": "dear"})
    assert (first["x-leadline-model"], other["x-leadline-model"], again["x-leadline-cache"]) == ("cheap", "dear", "hit")


async def test_a_hint_that_cannot_be_read_is_a_400_and_no_row(gateway: Gateway) -> None:
    status, _, body = await gateway.chat(ask(model="auto"), **{"x-leadline-min-quality": "90%"})
    assert status == 400
    assert body["error"]["message"] == "x-leadline-min-quality: '90%' is not a probability such as 0.9; send 0 to 1."
    assert await gateway.rows() == []


@pytest.mark.parametrize("names", ["nobody", "dear, nobody"])
async def test_a_hint_that_names_no_model_of_the_policy_is_a_400_that_tells_those_there_are(
    gateway: Gateway, names: str
) -> None:
    said = "x-leadline-models: 'nobody' is no model of the policy; send some of cheap, dear, gone, free."
    status, _, body = await gateway.chat(ask(model="auto"), **{"x-leadline-models": names})
    assert (status, body["error"]["message"]) == (400, said)
    assert await gateway.rows() == []
    asked = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
    headers = gateway.headers(**{"x-leadline-models": names})
    async with gateway.session.post(f"{gateway.url}/leadline/v1/explain", json=asked, headers=headers) as response:
        explained = await response.json()
    assert (response.status, explained["error"]["message"]) == (400, said)


async def test_explain_hears_hints_and_tells_the_routes(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        body = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
        headers = gateway.headers(**{"x-leadline-models": "dear"})
        async with gateway.session.post(f"{gateway.url}/leadline/v1/explain", json=body, headers=headers) as response:
            told = await response.json()
    assert told["decision"]["plan"]["model"] == "dear"
    assert told["routes"] == [{"route": "auto", "taken": True, "why": "the model asked for is auto"}]
    assert "route auto: taken: the model asked for is auto" in told["lines"]
