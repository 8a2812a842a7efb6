"""Formats, tool calls and sampling parameters through /v1/chat/completions on local models."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionToolParam
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from gateway.edge.wire import read_chat
from gateway.upstream.begun import read_begun
from gateway.upstream.local_params import ToolChoice, sampling_params, tool_choice
from gateway.upstream.types import CallHeaders, ChatCall, UpstreamError
from local_engine.types import SamplingParams, TextFormat
from tests.gateway.conftest import Gateway, ask, running
from tests.local_engine.small_tokenizers import save_model

POLICY = """
version: 1
providers: {{home: {{engine: embedded}}}}
models:
  base: {{provider: home, model: bundled/base, context: 1024, price: free}}
  mindless: {{provider: home, model: "{folder}", context: 2048, price: free, tools: true}}
routes: [{{name: auto, when: {{model: auto}}, use: [base]}}]
"""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "greet", "parameters": PERSON}}
LETTER = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1000, "maxLength": 1200}},
    "required": ["text"],
    "additionalProperties": False,
}
LONG_TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "write", "parameters": LETTER}}


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Gateway]:
    policy = POLICY.format(folder=save_model(tmp_path / "mindless"))
    async with running(policy, tmp_path / "home") as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(240):
            await gateway.app.engine.ready.wait()
        yield gateway


@pytest.mark.anyio
@pytest.mark.engine
@pytest.mark.timeout(300)
async def test_local_models_keep_formats_and_call_tools(home: Gateway) -> None:
    async def answer(model: str, **fields: Any) -> dict[str, Any]:
        status, _, body = await home.chat(ask("What is 3 + 4?", model, **fields))
        assert status == 200, body
        choice: dict[str, Any] = body["choices"][0]
        return choice

    answers = [answer("mindless", seed=seed, response_format=FORMAT) for seed in range(2)]
    answers.append(answer("base", seed=1, temperature=1.5, response_format=FORMAT))
    for choice in await asyncio.gather(*answers):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)

    thinks = (await answer("base", temperature=0, structured_outputs={"regex": "[0-9]{2}"}))["message"]
    assert re.fullmatch("[0-9]{2}", thinks["content"])
    assert "=" in thinks["reasoning_content"], "it may think before it answers"

    first, second = [await answer("mindless", seed=9, max_tokens=12, cache=n, top_k=40, min_p=0.001) for n in (1, 2)]
    assert first["message"]["content"] == second["message"]["content"] != ""

    async with openai.AsyncOpenAI(base_url=f"{home.url}/v1", api_key=home.key) as client:
        whole = await client.chat.completions.create(
            model="mindless", messages=[{"role": "user", "content": "hi"}], seed=2, tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "greet"}},
        )  # fmt: skip
        stream = await client.chat.completions.create(
            model="mindless", messages=[{"role": "user", "content": "hi"}], seed=2, tools=[LONG_TOOL],
            tool_choice="required", stream=True, extra_headers={"Cache-Control": "no-store"},
        )  # fmt: skip
        deltas: list[ChoiceDeltaToolCall] = []
        reasons: list[str] = []
        async for chunk in stream:
            for piece in chunk.choices:
                deltas += piece.delta.tool_calls or []
                reasons += [piece.finish_reason] if piece.finish_reason else []
    assert whole.choices[0].finish_reason == "tool_calls"
    assert reasons == ["tool_calls"]
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "greet"
    pieces = [delta.function for delta in deltas if delta.function is not None]
    assert (deltas[0].id or "", pieces[0].name) == (deltas[0].id, "write")
    jsonschema.validate(json.loads(call.function.arguments), PERSON)
    assert len(deltas) > 2, "arguments come as they are written, to whoever keeps up"
    jsonschema.validate(json.loads("".join(piece.arguments or "" for piece in pieces)), LETTER)

    for fields, param in (
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"top_k": "3"}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ):  # fmt: skip
        status, _, body = await home.chat(ask("hi", "mindless", **fields))
        assert (status, body["error"]["param"]) == (400, param)
        assert body["error"]["message"].startswith(param)


def call_of(**fields: Any) -> ChatCall:
    return read_chat(json.dumps(ask(**fields)).encode(), CallHeaders(token="t"))


@pytest.mark.parametrize("field", ["structured_outputs", "guided_json", "guided_regex", "guided_choice"])
def test_a_format_is_one_by_whichever_name(field: str) -> None:
    assert call_of(**{field: {"regex": "a"}}).has_format
    assert not call_of(**{field: None}).has_format


def test_every_field_reaches_the_engine() -> None:
    fields = {
        "max_completion_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "7": 1.5},
        "seed": 11, "stop": ["x"], "stop_token_ids": [4], "logprobs": True, "top_logprobs": 3,
        "reasoning_effort": "high", "response_format": {"type": "json_object"},
    }  # fmt: skip
    assert sampling_params(call_of(**fields), 3) == SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-1, repetition_penalty=1.5, logit_bias={5: -100, 7: 1.5}, seed=11, stop=("x",),
        stop_token_ids=(4,), logprobs=True, top_logprobs=3, effort="high", response_format=TextFormat("json_object"),
    )  # fmt: skip
    assert sampling_params(call_of(top_k=None, response_format={"type": "text"}), 3) == SamplingParams(seed=3)


@pytest.mark.parametrize(
    ("given", "format"),
    [
        ({"json": {"type": "null"}}, TextFormat("json_schema", '{"type": "null"}', "structured_outputs.json")),
        ({"json": '{"type": "null"}'}, TextFormat("json_schema", '{"type": "null"}', "structured_outputs.json")),
        ({"regex": "a|b"}, TextFormat("regex", "a|b", "structured_outputs.regex")),
        ({"choice": ["a.b", "c|d"]}, TextFormat("regex", r"a\.b|c\|d", "structured_outputs.choice")),
    ],
)
def test_structured_outputs_are_read_in_vllms_shape(given: dict[str, Any], format: TextFormat) -> None:
    assert sampling_params(call_of(structured_outputs=given), 3).response_format == format


def test_a_tool_choice_is_read_in_every_shape() -> None:
    assert tool_choice(call_of()) == ToolChoice("auto")
    assert tool_choice(call_of(tool_choice="required")) == ToolChoice("required")
    named = {"type": "function", "function": {"name": "f"}}
    assert tool_choice(call_of(tool_choice=named)) == ToolChoice("required", "f")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids[0]"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"reasoning_effort": "ultra"}, "reasoning_effort"),
    ],
)
def test_a_field_of_another_shape_is_named(fields: dict[str, Any], param: str) -> None:
    call = call_of(**fields)
    with pytest.raises(UpstreamError) as refusal:
        _ = sampling_params(call, 3), tool_choice(call)
    assert refusal.value.status == 400
    assert refusal.value.error is not None
    assert str(refusal.value.error["param"]) == param


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("functions", [{"name": "f"}], "send tools"),
        ("function_call", {"name": "f"}, "send tool_choice"),
        ("function_call", "none", "send tool_choice"),
        ("allowed_token_ids", [3], "send structured_outputs"),
        ("truncate_prompt_tokens", 100, "shorten the messages"),
        ("use_beam_search", True, "leave it out"),
        ("length_penalty", 0.5, "leave it out"),
        ("skip_special_tokens", False, "leave it out"),
        ("typical_p", 0.9, "send top_p"),
        ("grammar", 'root ::= "a"', "send response_format"),
        ("json_schema", {"type": "object"}, "send response_format"),
        ("json_schema", {}, "send response_format"),
        ("chat_template", "{{ messages }}", "leave it out"),
        ("thinking", {"type": "disabled"}, "send reasoning_effort"),
        ("enable_thinking", False, "send chat_template_kwargs: {enable_thinking}, or reasoning_effort"),
        ("modalities", ["text", "audio"], 'send ["text"]'),
        ("echo", True, "leave it out"),
        ("add_generation_prompt", False, "send continue_final_message: true"),
    ],
)
def test_a_field_that_is_not_known_is_refused_with_what_does_the_same(field: str, value: object, fix: str) -> None:
    with pytest.raises(UpstreamError) as refusal:
        sampling_params(call_of(**{field: value}), 3)
    assert refusal.value.error is not None
    assert (refusal.value.status, refusal.value.error["param"]) == (400, field)
    assert refusal.value.message.startswith(f"{field}: ")
    assert fix in refusal.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [], "function_call": "auto", "allowed_token_ids": None, "truncate_prompt_tokens": None},
        {"use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True, "typical_p": 1, "best_of": 1},
        {"grammar": "", "json_schema": None, "chat_template": None, "thinking": None, "enable_thinking": None},
        {"modalities": ["text"], "echo": False, "add_generation_prompt": True, "length_penalty": None},
    ],
)
def test_a_field_that_asks_for_nothing_is_passed_over(fields: dict[str, Any]) -> None:
    assert sampling_params(call_of(**fields), 3) == SamplingParams(seed=3)


def test_an_answer_that_has_begun_goes_on_without_a_generation_prompt() -> None:
    last = {"role": "assistant", "content": "The answer", "prefix": True}
    fields: dict[str, Any] = {"messages": [*ask()["messages"], last], "add_generation_prompt": False}
    call = read_begun(call_of(**fields, continue_final_message=True))
    assert (call.prefix, sampling_params(call, 3)) == ("The answer", SamplingParams(seed=3))


@pytest.mark.parametrize(("given", "refused"), [(True, True), (False, False), (None, False)])
def test_deepseeks_word_for_going_on_is_refused_with_ours(given: bool | None, refused: bool) -> None:
    messages = [*ask()["messages"], {"role": "assistant", "content": "The answer", "prefix": given}]
    call = call_of(messages=messages)
    if not refused:
        assert sampling_params(call, 3) == SamplingParams(seed=3)
        return
    with pytest.raises(UpstreamError, match=r"messages\[1\].prefix: .*send continue_final_message: true") as refusal:
        sampling_params(call, 3)
    assert refusal.value.error is not None
    assert refusal.value.error["param"] == "messages[1].prefix"
