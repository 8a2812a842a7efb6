"""Tool calls are found in what models write, however it is cut, and nothing else is taken for one."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.chat import InvalidRequest
from local_engine.tool_calls import ToolCallParser, ToolFormat, check_functions, tool_format
from local_engine.types import ToolCallDelta

Calls = list[tuple[str, str]]


def read(format: ToolFormat, pieces: list[str]) -> tuple[str, Calls, list[ToolCallDelta]]:
    """(content, names with arguments, every delta) of an answer that comes in these pieces."""
    parser = ToolCallParser(format)
    told = [parser.push(piece) for piece in pieces] + [parser.finish()]
    deltas = [delta for part in told for delta in part.calls]
    calls: Calls = []
    for delta in deltas:
        if delta.name:
            assert delta.index == len(calls)
            assert len(delta.id) == 9
            calls.append((delta.name, ""))
        assert delta.index == len(calls) - 1, "a call's name comes first"
        calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    assert parser.calls == len(calls)
    return "".join(part.content for part in told), calls, deltas


WEATHER = '{"city": "Z}ü\\"r{ich", "days": [1, {"a": "<tool_call>"}]}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>'
CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    ("hermes", f"Let me look.\n{HERMES}", "Let me look.\n", [("weather", WEATHER)]),
    ("hermes", f"{HERMES}\n{HERMES}\n", "", [("weather", WEATHER), ("weather", WEATHER)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a":1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {} , "id": [3]} </tool_call> so', " so", [("f", "{}")]),
    ("hermes", "a <tool_call> b <tool", "a <tool_call> b <tool", []),
    ("hermes", '<tool_call>{"x": {"name": 1}}</tool_call>', '<tool_call>{"x": {"name": 1}}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f"}', '<tool_call>{"name": "f"}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", "1 < 2", "1 < 2", []),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "",
     [("f", "{}"), ("g", "{}")]),
    ("llama", '{"type": "function", "function": "f", "parameters": {"a": 1}}', "", [("f", '{"a":1}')]),
    ("llama", '{"name": "f", "parameters": {}} so ', " so ", [("f", "{}")]),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", 'Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', []),
    ("llama", "{not json", "{not json", []),
    ("llama", '<|python_tag|>search.call("x")', '<|python_tag|>search.call("x")', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"a": [1]}'), ("g", "{}")]),
    ("mistral", "Well [TOOL_CALLS] none", "Well [TOOL_CALLS] none", []),
    ("mistral", "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES)
def test_calls_are_found_whole_or_letter_by_letter(format: ToolFormat, text: str, content: str, calls: Calls) -> None:
    for pieces in ([text], list(text)):
        assert read(format, pieces)[:2] == (content, calls)


fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f", "arguments": {"a": 1}}', "{", "}",
     '{"name": "f", ', '"parameters": {}', '"arguments": ', '{"x": 1}', "[", "]", ",", ";", " ", "\n", '"', "\\", "ok"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    format=st.sampled_from(["hermes", "llama", "mistral"]),
    parts=st.lists(fragments, max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_what_is_told_does_not_depend_on_the_cuts(format: ToolFormat, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    whole, cut, letters = read(format, [text]), read(format, pieces), read(format, list(text))
    assert whole[:2] == cut[:2] == letters[:2]
    if not whole[1]:
        assert whole[0] == text


def test_a_call_is_told_as_it_is_written() -> None:
    parser = ToolCallParser("hermes")
    assert not parser.push('<tool_call>\n{"name": "weather", "arguments"').calls
    (name,) = parser.push(": {").calls[:1]
    assert (name.name, name.arguments) == ("weather", "")
    assert [delta.arguments for delta in parser.push('"city": "Zü').calls] == ['"city": "Zü']
    assert [delta.arguments for delta in parser.push('rich"}').calls] == ['rich"}']
    assert not parser.push("}").calls


# The parts of published templates that tell the formats apart.
@pytest.mark.parametrize(
    ("template", "format"),
    [
        ('{{- "\\n<tool_call>\\n" }}{{ tool_call | tojson }}', "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}',
         "llama"),
        ('{{- "<|python_tag|>" + tool_call.name + ".call(" }}', "llama"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
    ],
)  # fmt: skip
def test_the_template_says_how_calls_are_written(template: str, format: ToolFormat | None) -> None:
    assert tool_format(template) == format


def test_arguments_are_json_when_the_call_is() -> None:
    _, [(_, arguments)], _ = read("hermes", list(HERMES))
    assert json.loads(arguments) == {"city": 'Z}ü"r{ich', "days": [1, {"a": "<tool_call>"}]}


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ([{"name": "f"}, {"name": "g"}, {"name": "f"}], "tools[2].function.name: 'f' is tools[0]'s already; give"),
        ([{"name": ""}], "tools[0].function.name: '' is no name; send 1 to 64"),
        ([{"name": "f"}, {"name": "a b"}], "tools[1].function.name: 'a b' is no name; send 1 to 64"),
        ([{"name": "f\n"}], "tools[0].function.name: 'f\\n' is no name"),
        ([{"name": "f" * 65}], "tools[0].function.name: "),
        ([{"name": "f", "description": 5}], "tools[0].function.description: 5 is no text; send a string"),
    ],
)
def test_tools_that_cannot_be_told_apart_or_shown_are_refused(functions: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_functions([{"type": "function", "function": function} for function in functions])
    assert str(refused.value).startswith(words)
    assert (refused.value.param, len(str(refused.value)) < 200) == (words.partition(":")[0], True)


def test_tools_with_names_and_descriptions_are_fine() -> None:
    functions = [{"name": "a_B-9"}, {"name": "f" * 64, "description": "x"}, {"name": "g", "description": None}]
    check_functions([{"function": function} for function in functions])
