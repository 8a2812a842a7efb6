"""The `openai` client, told to believe no answer that its own types do not describe, finds nothing to object to."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel

from tests.faults.serving import serving
from tests.upstream.process import upstream_process

POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 20s, retries: 0}}
models:
  small: {{provider: fake, model: small, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, output: $0.60/Mtok}}}}
  embed: {{provider: fake, model: embed, context: 8000, embeds: true, price: {{input: $0.02/Mtok}}}}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "sound",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "fathoms": {"type": "integer"}}},
    },
}


class Depth(BaseModel):
    place: str
    fathoms: int


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder: Path = tmp_path_factory.mktemp("strict")
    with (
        upstream_process(folder / "truth.jsonl") as upstream,
        serving(POLICY.format(url=upstream.url), folder) as gateway,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{gateway.port}/v1",
            api_key=gateway.key,
            max_retries=0,
            _strict_response_validation=True,
        ) as made,
    ):
        yield made


def ask(text: str) -> openai.types.chat.ChatCompletionUserMessageParam:
    return {"role": "user", "content": text}


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="small", messages=[ask("How deep?")], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="small", messages=[ask("How deep is it?")], stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == text != ""
    assert answer.usage is not None


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": "small", "messages": [ask("off Ushant")], "tools": [TOOL], "tool_choice": "required"}
    if stream:
        with client.chat.completions.stream(**asked) as streamed:  # type: ignore[arg-type]
            message = streamed.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**asked).choices[0].message  # type: ignore[call-overload]
    assert message.tool_calls
    (call,) = message.tool_calls
    assert Depth.model_validate_json(call.function.arguments) == Depth(place="off Ushant", fathoms=3)


def test_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="small", messages=[ask("off Ushant")], response_format=Depth)
    assert answer.choices[0].message.parsed == Depth(place="off Ushant", fathoms=3)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="small", prompt="It is", max_tokens=8)
    # The client's type of a chunk has a finish reason; on the wire, only the last chunk has one.
    with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as lenient:
        chunks = list(lenient.completions.create(model="small", prompt="It is", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text != ""


def test_embeddings(client: openai.OpenAI) -> None:
    # By default the client asks for base64, which it checks as numbers before it decodes it.
    with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as lenient:
        by_default = lenient.embeddings.create(model="embed", input=["one", "two"])
    as_numbers = client.embeddings.create(model="embed", input=["one", "two"], encoding_format="float")
    assert [len(entry.embedding) for entry in as_numbers.data] == [8, 8]
    for packed, plain in zip(by_default.data, as_numbers.data, strict=True):
        assert packed.embedding == pytest.approx(plain.embedding)


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["small", "embed"]
    assert client.models.retrieve("embed").owned_by == "fake"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=[ask("x")])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-ll-none").models.list()
