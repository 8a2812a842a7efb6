"""The recorded upstream: it answers what was recorded and nothing else, and its books are right."""

import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from recorded_upstream import (
    PRICES,
    STRONG,
    WEAK,
    DollarPrice,
    RecordedUpstream,
    bill_nanousd,
    count_tokens,
    pieces,
    prompt_tokens,
)

pytestmark = pytest.mark.anyio

QUESTION = "How many eggs are 16 - 3 - 4?"
ANSWER = " Sixteen minus seven is nine eggs — that's “9”.\n" * 5 + "#### 9\n"


@dataclass
class Upstream:
    client: TestClient[Any, Any]
    file: io.StringIO

    @property
    def truth(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.getvalue().splitlines()]

    async def ask(self, model: str = WEAK, question: str = QUESTION, **fields: Any) -> tuple[int, bytes]:
        body = {"model": model, "messages": [{"role": "user", "content": question}], **fields}
        async with self.client.post("/v1/chat/completions", json=body) as response:
            return response.status, await response.read()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    file = io.StringIO()
    server = RecordedUpstream({(WEAK, QUESTION): ANSWER, (STRONG, QUESTION): "It is 9."}, file)
    async with TestClient(TestServer(server.app())) as client:
        yield Upstream(client, file)


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_each_model_gives_its_own_recorded_answer(upstream: Upstream) -> None:
    texts = []
    for model in (WEAK, STRONG):
        status, body = await upstream.ask(model)
        assert status == 200
        texts.append(json.loads(body)["choices"][0]["message"]["content"])
    assert texts == [ANSWER, "It is 9."]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("model", "question"), [(WEAK, QUESTION + " "), ("gpt-5", QUESTION)])
async def test_what_was_not_recorded_is_404_and_free(
    upstream: Upstream, model: str, question: str, streamed: bool
) -> None:
    status, body = await upstream.ask(model, question, stream=streamed)
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_recorded"
    assert [(row["status"], row["nanousd"]) for row in upstream.truth] == [(404, 0)]


async def test_a_stream_says_what_a_plain_answer_says(upstream: Upstream) -> None:
    _, plain = await upstream.ask()
    _, streamed = await upstream.ask(stream=True, stream_options={"include_usage": True})
    answer, chunks = json.loads(plain), chunks_of(streamed)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(deltas) == answer["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]


async def test_a_stream_tells_its_usage_only_where_asked(upstream: Upstream) -> None:
    _, body = await upstream.ask(stream=True)
    assert all("usage" not in chunk for chunk in chunks_of(body))


async def test_truth_holds_what_the_client_was_told(upstream: Upstream) -> None:
    _, plain = await upstream.ask(STRONG)
    await upstream.ask(WEAK, stream=True)
    answer = json.loads(plain)
    first, second = upstream.truth
    tokens = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    assert first == {
        "id": answer["id"],
        "model": STRONG,
        "status": 200,
        "streamed": False,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "nanousd": 10_000 * tokens[0] + 30_000 * tokens[1],
    }
    assert second["streamed"]
    assert second["id"] != first["id"]


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("eggs", 1), ("sixty", 2), ("16 - 3 = 13.", 6), ("$1,000", 4), (" \n ", 0)]
)
def test_tokens_by_hand(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


def test_a_message_costs_four_tokens_beside_its_text() -> None:
    assert prompt_tokens([{"role": "system", "content": "eggs"}, {"role": "user", "content": "16 - 3"}]) == 12


@pytest.mark.parametrize(
    ("model", "prompt", "completion", "nanousd"),
    [(STRONG, 100, 200, 7_000_000), (STRONG, 1, 1, 40_000), (WEAK, 100, 200, 180_000), (WEAK, 0, 1, 600)],
)
def test_money_by_hand(model: str, prompt: int, completion: int, nanousd: int) -> None:
    assert bill_nanousd(PRICES[model], prompt, completion) == nanousd


@pytest.mark.parametrize(("tokens", "nanousd"), [(1, 0), (2, 1), (4, 1), (5, 1), (6, 2)])
def test_a_call_is_rounded_half_up_once(tokens: int, nanousd: int) -> None:
    """At $0.00025 per million tokens a token costs a quarter of a nano-dollar."""
    price = DollarPrice(Decimal("0.00025"), Decimal("0.00025"))
    assert bill_nanousd(price, tokens, 0) == nanousd
    assert bill_nanousd(price, 0, tokens) == nanousd


@pytest.mark.parametrize("text", ["", "one", ANSWER, "…" * 40, "\n\nend"])
def test_pieces_are_the_text_again(text: str) -> None:
    assert "".join(pieces(text)) == text
