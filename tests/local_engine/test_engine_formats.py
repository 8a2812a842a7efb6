"""Formats, tool calls and sampling parameters through the whole engine, with a model that has no mind of its own."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from local_engine.chat import parse_messages, parse_tools, prompt_tokens
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.types import Delta, SamplingParams, TextFormat
from tests.local_engine.engine_harness import Caller
from tests.local_engine.small_tokenizers import save_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "greet", "parameters": PERSON}}]
OBJEKT = b'[{"function": {"name": "f", "parameters": {"type": "objekt"}}}]'
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def mindless(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """Its rows of logits are wider than its tokenizer."""
    return load_model("m", str(save_model(tmp_path_factory.mktemp("mindless"), vocabulary=448)), "float32", "cpu")


@pytest.fixture(scope="module")
def caller(mindless: LocalModel) -> Iterator[Caller]:
    engine = Engine({"m": mindless}, max_running=8)
    engine.start()
    yield Caller(engine)
    engine.stop()


def calls(caller: Caller, id: int, choice: int = 0) -> list[tuple[str, str]]:
    """Name and arguments of every call of one choice, as its deltas tell them."""
    found: list[tuple[str, str]] = []
    for event in caller.wait(id):
        for delta in event.tool_calls if isinstance(event, Delta) and event.choice == choice else ():
            if delta.name:
                found.append((delta.name, ""))
            found[delta.index] = (found[delta.index][0], found[delta.index][1] + delta.arguments)
    return found


def test_answers_of_one_batch_each_keep_their_format(caller: Caller) -> None:
    schema = TextFormat("json_schema", json.dumps(PERSON))
    schemas = [caller.generate("hi", SamplingParams(seed=seed, response_format=schema)) for seed in range(3)]
    words = caller.generate("hi", SamplingParams(seed=1, response_format=TextFormat("regex", "(?:yes|no){2}")))
    free = caller.generate("hi", SamplingParams(seed=1, max_tokens=30))
    for id in schemas:
        assert caller.finished(id).finish_reason == "stop"
        jsonschema.validate(json.loads(caller.content(id)), PERSON)
    assert len({caller.content(id) for id in schemas}) == 3
    caller.finished(words)
    assert re.fullmatch("(?:yes|no){2}", caller.content(words))
    assert caller.finished(free).output_tokens > 0


def test_choices_of_one_request_keep_the_format_each_in_its_own_words(caller: Caller) -> None:
    form = TextFormat("regex", "[a-z]{6}")
    id = caller.generate("hi", SamplingParams(seed=5, response_format=form), n=3)
    caller.wait(id)
    texts = ["".join(e.content for e in caller.wait(id) if isinstance(e, Delta) and e.choice == n) for n in range(3)]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts)
    assert len(set(texts)) == 3


def test_a_call_that_is_required_is_made(caller: Caller) -> None:
    options: dict[str, Any] = {"tools_json": json.dumps(TOOLS).encode(), "tool_choice": "required"}
    id = caller.generate("hi", SamplingParams(seed=3), **options, tool="greet")
    assert caller.finished(id).finish_reason == "tool_calls"
    assert caller.content(id) == ""
    ((name, arguments),) = calls(caller, id)
    assert name == "greet"
    jsonschema.validate(json.loads(arguments), PERSON)


def test_calls_are_found_in_what_the_model_writes_by_itself(caller: Caller) -> None:
    call = '<tool_call>\n{"name": "greet", "arguments": {"name": "é", "age": 4}}\n</tool_call>'
    written = TextFormat("regex", "Sure\\.\n" + re.sub(r"([{}])", r"\\\1", f"{call}\n{call}"))
    tools = json.dumps(TOOLS).encode()
    id = caller.generate("hi", SamplingParams(response_format=written), tools_json=tools)
    assert caller.finished(id).finish_reason == "tool_calls"
    assert caller.content(id) == "Sure.\n"
    assert calls(caller, id) == [("greet", '{"name": "é", "age": 4}')] * 2
    unasked: list[dict[str, Any]] = [{}, {"tools_json": tools, "tool_choice": "none"}]
    for options in unasked:
        id = caller.generate("hi", SamplingParams(response_format=written), **options)
        assert caller.finished(id).finish_reason == "stop"
        assert caller.content(id) == f"Sure.\n{call}\n{call}"
        assert not calls(caller, id)


def test_stop_strings_end_a_text_whatever_its_tokens_are(caller: Caller) -> None:
    sampling = SamplingParams(seed=2, stop=("yno", "zzz"), response_format=TextFormat("regex", "(?:very no){1,9}"))
    id = caller.generate("hi", sampling)
    assert caller.finished(id).finish_reason in ("stop", "length")
    assert caller.content(id) in ("very no" * n for n in range(1, 10))
    id = caller.generate("hi", SamplingParams(seed=2, stop=("ry n",), response_format=sampling.response_format))
    assert caller.finished(id).finish_reason == "stop"
    assert caller.content(id) == "ve"


def test_parameters_reach_the_sampler(caller: Caller, mindless: LocalModel) -> None:
    (seven,) = mindless.tokenizer.encode("7", add_special_tokens=False)
    bias = SamplingParams(logit_bias={seven: 100.0}, max_tokens=5, logprobs=True, top_logprobs=2)
    id = caller.generate("hi", bias)
    assert caller.finished(id).finish_reason == "length"
    assert caller.content(id) == "77777"
    entries = [entry for event in caller.wait(id) if isinstance(event, Delta) for entry in event.logprobs]
    assert [entry.token for entry in entries] == [b"7"] * 5
    assert all(entry.logprob < -3 and entry.entropy is not None and entry.entropy > 3 for entry in entries), "raw"
    ended = caller.generate("hi", SamplingParams(logit_bias={seven: 100.0}, stop_token_ids=(seven,)))
    assert (caller.finished(ended).finish_reason, caller.content(ended)) == ("stop", "")
    longer = SamplingParams(temperature=0, logit_bias={mindless.tokenizer.eos_token_id: 100.0}, min_tokens=6)
    assert caller.finished(caller.generate("hi", longer)).output_tokens == 7


@pytest.mark.parametrize(
    ("sampling", "options", "param"),
    [
        (SamplingParams(response_format=TextFormat("json_schema", '{"not": {}}', "a.b")), {}, "a.b"),
        (SamplingParams(response_format=TextFormat("json_object")), {"prefix": "{"}, "response_format"),
        (SamplingParams(), {"tool_choice": "required"}, "tool_choice"),
        (SamplingParams(), {"tool_choice": "required", "tools_json": b"[]", "tool": "x"}, "tool_choice"),
        (SamplingParams(), {"tools_json": b'[{"function": {}}]'}, "tools"),
        (SamplingParams(), {"tools_json": b'[{"function": {"name": "a b"}}]'}, "tools[0].function.name"),
        (SamplingParams(), {"tools_json": OBJEKT}, "tools[0].function.parameters"),
        (SamplingParams(), {"tools_json": OBJEKT, "tool_choice": "required"}, "tools[0].function.parameters"),
        (SamplingParams(min_p=2), {}, "min_p"),
        (SamplingParams(logit_bias={448: 1.0}), {}, "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_field(
    caller: Caller, sampling: SamplingParams, options: dict[str, Any], param: str
) -> None:
    failed = caller.failed(caller.generate("hi", sampling, **options))
    assert (failed.code, failed.param) == ("invalid_request", param)
    assert failed.message.startswith(param)


def test_a_call_that_cannot_be_written_to_its_end_is_refused(caller: Caller) -> None:
    tools = b'[{"function": {"name": "f", "parameters": {"$ref": "#"}}}]'
    failed = caller.failed(caller.generate("hi", SamplingParams(), tools_json=tools, tool_choice="required"))
    assert (failed.code, failed.message) == ("invalid_request", "tools: nothing can match it; correct it")


@pytest.mark.parametrize("field", ["response_format", "structured_outputs.regex"])
def test_an_answer_is_a_call_or_of_a_format(caller: Caller, field: str) -> None:
    sampling = SamplingParams(response_format=TextFormat("regex", "a", field))
    tools = json.dumps(TOOLS).encode()
    failed = caller.failed(caller.generate("hi", sampling, tools_json=tools, tool_choice="required"))
    assert (failed.code, failed.param) == ("invalid_request", "tool_choice")
    assert failed.message.startswith(f"tool_choice: an answer that is a call cannot be of {field}, too; leave out")


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("x", "messages[1].tool_calls: 'x' is no list"),
        ([{}], "messages[1].tool_calls[0]: {} is no call"),
        ([CALL, 5], "messages[1].tool_calls[1]: 5 is no call"),
        ([{"function": {"name": "f"}}], "messages[1].tool_calls[0]: {'function': {'name': 'f'}} is no call"),
        ([{"function": {"name": 7, "arguments": "{}"}}], "messages[1].tool_calls[0]: "),
    ],
)
def test_calls_of_the_history_are_named_where_they_are_none(caller: Caller, calls: Any, words: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    failed = caller.failed(caller.generate(json.dumps(messages).encode()))
    assert (failed.code, failed.param) == ("invalid_request", "messages")
    assert failed.message.startswith(words)
    assert "function: {name, arguments}" in failed.message


@pytest.mark.parametrize("calls", [None, [], [CALL], [{"function": {"name": "f", "arguments": {}}}]])
def test_calls_of_the_history_are_read(caller: Caller, calls: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    id = caller.generate(json.dumps(messages).encode(), SamplingParams(max_tokens=1))
    assert caller.finished(id).output_tokens == 1


def test_the_template_shows_tools_and_calls(mindless: LocalModel) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "greet", "arguments": '{"age": 4}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "123456789"},
    ]
    prompt = prompt_tokens(
        mindless.tokenizer, parse_messages(json.dumps(messages).encode()), parse_tools(json.dumps(TOOLS).encode())
    )
    text = mindless.tokenizer.decode(prompt)
    assert '"name": "greet"' in text.partition("<|im_end|>")[0]
    assert (
        '<tool_call>\n{"name": "greet", "arguments": {"age": 4}}\n</tool_call><|im_end|>\n<|im_start|>tool\ndone'
        in text
    )
