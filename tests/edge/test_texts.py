"""`/v1/completions` and `/v1/embeddings`: the same admission, ledger and receipts as chat."""

import json
from typing import Any

import openai
import pytest

from gateway.edge.prompts import MAX_INPUTS, MAX_TOKEN_IDS, read_completion, read_embedding
from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders
from routers.errors import PolicyError
from routers.load import parse
from tests.edge.conftest import StartEdge, post
from tests.edge.provider import Provider
from tests.gateway.conftest import Gateway

anyio = pytest.mark.anyio
NOBODY = CallHeaders("")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("once", 1),
        ("", 1),
        (["once", "twice"], 2),
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        (["", "a,b"], 2),
    ],
)
def test_a_prompt_is_a_text_or_texts_or_token_ids(prompt: Any, texts: int) -> None:
    completion = read_completion(json.dumps({"model": "m", "prompt": prompt, "n": 2, "best_of": 3}).encode(), NOBODY)
    assert (completion.inputs, completion.choices, completion.endpoint) == (texts, 3 * texts, "completions")
    embedding = read_embedding(json.dumps({"model": "m", "input": prompt}, indent=1).encode(), NOBODY)
    assert (embedding.inputs, embedding.sampling.max_tokens, embedding.endpoint) == (texts, 0, "embeddings")


@pytest.mark.parametrize("read", [read_completion, read_embedding])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("null", "Expected `str`"),
        ("7", "Expected `str`"),
        ('{"a": 1}', "Expected `str`"),
        ("[]", "empty"),
        ("[[]]", "empty"),
        ("[[1],[]]", "empty"),
        ('["a", 1]', "Expected `str`"),
        ('[1, "a"]', "Expected `int`"),
        ("[1, [2]]", "Expected `int`"),
        ("[[1], 2]", "Expected `array`"),
        ("[-1]", "Expected `int` >= 0"),
        ("[1.5]", "Expected `int`"),
        ("[true]", "Expected"),
        ("[99999999999999999999]", "Expected `int`"),
        (json.dumps(["a"] * (MAX_INPUTS + 1)), f"send 1 to {MAX_INPUTS}"),
        ("[" + "1," * MAX_TOKEN_IDS + "1]", "token ids"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(read: Any, value: str, words: str) -> None:
    name = "prompt" if read is read_completion else "input"
    with pytest.raises(InvalidRequest) as caught:
        read(f'{{"model": "m", "{name}": {value}}}'.encode(), NOBODY)
    assert caught.value.param == name
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("read", "more", "param"),
    [
        (read_completion, {"n": 0}, "n"),
        (read_completion, {"n": 3, "best_of": 2}, "best_of"),
        (read_completion, {"max_tokens": 0}, "max_tokens"),
        (read_completion, {"temperature": 3}, "temperature"),
        (read_completion, {"logprobs": 21}, "logprobs"),
        (read_completion, {"stop": ["a", ""]}, "stop"),
        (read_completion, {"service_tier": "flex"}, "service_tier"),
        (read_completion, {"base_url": "http://x"}, "base_url"),
        (read_embedding, {"dimensions": 0}, "dimensions"),
        (read_embedding, {"encoding_format": "hex"}, "encoding_format"),
        (read_embedding, {"stream": True}, "stream"),
        (read_embedding, {"api_key": "sk-x"}, "api_key"),
    ],
)
def test_a_field_out_of_its_range_is_refused_by_name(read: Any, more: dict[str, Any], param: str) -> None:
    body = {"model": "m", "prompt" if read is read_completion else "input": "x", **more}
    with pytest.raises(InvalidRequest) as caught:
        read(json.dumps(body).encode(), NOBODY)
    assert caught.value.param == param


@anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_completion_is_billed_and_receipted_like_a_chat(
    edge: Gateway, provider: Provider, stream: bool
) -> None:
    body = {"model": "chat", "prompt": "say three words", "max_tokens": 10, "stream": stream, "unknown": [1, 2.0]}
    async with edge.session.post(f"{edge.url}/v1/completions", json=body, headers=edge.headers()) as response:
        assert response.status == 200
        raw = await response.read()
        request_id = response.headers["x-request-id"]
    assert provider.paths == ["/v1/completions"]
    sent = json.loads(provider.bodies[0])
    assert (sent["model"], sent["prompt"], sent["unknown"]) == ("wire-chat", "say three words", [1, 2.0])
    if stream:
        events = [json.loads(line[6:]) for line in raw.split(b"\n\n") if line.startswith(b"data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == "one two three"
        assert raw.endswith(b": leadline-cost-nanousd 9000\n\ndata: [DONE]\n\n")
    else:
        assert json.loads(raw)["choices"][0]["text"] == "one two three"
    (row,) = await edge.rows()
    assert (row["id"], row["endpoint"], row["stream"], row["outcome"]) == (request_id, "completions", stream, "ok")
    assert (row["input_tokens"], row["output_tokens"], row["cost_nanousd"]) == (3, 3, 9000)
    assert row["reserved_nanousd"] >= row["cost_nanousd"]


@anyio
@pytest.mark.parametrize("value", ["a b c", ["a b", "c"], [11, 12, 13], [[11, 12], [13]]], ids=str)
async def test_an_embedding_costs_its_input_alone(edge: Gateway, provider: Provider, value: Any) -> None:
    status, headers, body = await post(edge, "/v1/embeddings", {"model": "vectors", "input": value, "dimensions": 4})
    assert (status, headers["x-leadline-model"], headers["x-leadline-cost-nanousd"]) == (200, "vectors", "60")
    assert [len(entry["embedding"]) for entry in body["data"]] == [4] * (2 if isinstance(value[0], list) or
                                                                         value == ["a b", "c"] else 1)  # fmt: skip
    assert json.loads(provider.bodies[0])["dimensions"] == 4
    (row,) = await edge.rows()
    assert (row["endpoint"], row["input_tokens"], row["output_tokens"], row["cost_nanousd"]) == (
        "embeddings", 3, 0, 60,
    )  # fmt: skip


@anyio
async def test_many_texts_of_a_window_each_are_held_and_billed_in_full(edge: Gateway) -> None:
    texts = ["word " * 6000] * 10
    status, _, _ = await post(edge, "/v1/embeddings", {"model": "vectors", "input": texts})
    assert status == 200, "each text fits its own window, all of them together need not"
    (row,) = await edge.rows()
    assert row["input_tokens"] == 60_000
    assert row["reserved_nanousd"] >= row["cost_nanousd"] == 60_000 * 20


@anyio
@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {"model": "chat", "input": "x"}, "cannot embed"),
        ("/v1/completions", {"model": "vectors", "prompt": "x"}, "only embeds"),
        ("/v1/completions", {"model": "talker", "prompt": "x"}, "no raw prompt"),
        ("/v1/chat/completions", {"model": "vectors", "messages": [{"role": "user", "content": "x"}]}, "only embeds"),
    ],
)
async def test_a_model_is_never_asked_for_what_it_cannot_do(
    edge: Gateway, provider: Provider, path: str, body: dict[str, Any], words: str
) -> None:
    status, _, answer = await post(edge, path, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer["error"]["message"]
    assert provider.bodies == []


@anyio
async def test_the_openai_client_completes_and_embeds(edge: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key) as client:
        completion = await client.completions.create(model="chat", prompt="go", n=2, temperature=0)
        assert [choice.text for choice in completion.choices] == ["one two three"] * 2
        assert completion._request_id is not None
        assert completion._request_id.startswith("req_")
        text = ""
        async for chunk in await client.completions.create(model="chat", prompt="go", stream=True):
            text += chunk.choices[0].text
        assert text == "one two three"
        embedding = await client.embeddings.create(model="vectors", input=["a", "b"])
        assert embedding.data[1].embedding == [1.0, 2.0, 3.0], "base64 floats, decoded by the client"
        assert {model.id async for model in client.models.list()} == {"chat", "talker", "vectors"}


@anyio
async def test_the_same_fields_sent_to_two_endpoints_are_two_answers(edge: Gateway, provider: Provider) -> None:
    both = {"model": "chat", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    first = await post(edge, "/v1/chat/completions", both)
    second = await post(edge, "/v1/completions", both)
    again = await post(edge, "/v1/completions", both)
    assert [answer[1]["x-leadline-cache"] for answer in (first, second, again)] == ["miss", "miss", "hit"]
    assert (first[2]["object"], second[2]["object"], again[2]) == ("chat.completion", "text_completion", second[2])
    assert provider.paths == ["/v1/chat/completions", "/v1/completions"]


@anyio
async def test_a_budget_holds_for_every_endpoint(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge('limits: [{key: "*", budget: $0.000001/day}]') as edge:
        for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
            model = "chat" if field == "prompt" else "vectors"
            status, _, body = await post(edge, path, {"model": model, field: "word " * 100})
            assert (status, body["error"]["code"]) == (429, "budget_exceeded")
    assert provider.bodies == []


def test_a_price_without_output_is_for_embeddings_alone() -> None:
    policy = 'version: 1\nproviders: {{p: {{base_url: "http://127.0.0.1:1/v1"}}}}\nmodels:\n  m: {{{0}}}\n'
    model = "provider: p, model: x, price: {input: $1/Mtok}"
    with pytest.raises(PolicyError, match="no price of output"):
        parse(policy.format(model))
    price = parse(policy.format(model + ", embeds: true")).models["m"].price
    assert price is not None
    assert price.output == 0
