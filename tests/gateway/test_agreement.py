"""What two answers come to, and whether that is the same."""

import json
from typing import Any

import pytest

from gateway.agreement import agreed, final_answer, said


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("64", "$64.00"),
        ("1,250", "1250."),
        ("So it is so.\n\n**Answer: 64**", "#### 64"),
        (
            "We add and get 70.\nThe final answer is \\boxed{70}.",
            '```json\n{"reasoning": "35 + 35", "answer": "70"}\n```',
        ),
        ('{"reasoning": "two\nlines, \\(c\\)", "answer": 20}', "20"),
        ('{"b": 1, "a": [2]}', '{"a": [2], "b": 1, "explanation": "as said"}'),
        ("Yes.", "yes"),
        ("<think>no, 3 or 4</think>(B)", "b"),
        ("['a  b']", "['a  b']"),
    ],
)
def test_answers_that_come_to_the_same_agree(one: str, other: str) -> None:
    assert final_answer(one) == final_answer(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("64", "46"),
        ("It was founded in 1998.", "It closed in 1998."),
        ("5 May", "5 June"),
        ("3*4", "34"),
        ("5%", "5"),
        ("-5", "5"),
        ("['A']", "['a']"),
        ("'a  b'", "'a b'"),
        ('{"answer": "yes", "amount": 5}', '{"answer": "yes", "amount": 6}'),
        ("The answer is hard to give.\nLong ago, one said.", "The answer is hard to give.\nLong ago, two said."),
        ("\\boxed{1} or \\boxed{2}", "\\boxed{2} or \\boxed{1}"),
    ],
)
def test_answers_that_differ_do_not_agree(one: str, other: str) -> None:
    assert final_answer(one) != final_answer(other)


@pytest.mark.parametrize("text", ["", "  \n", "<think>only thought</think>", "{}", "**"])
def test_who_says_nothing_agrees_with_nobody(text: str) -> None:
    assert final_answer(text) is None
    assert agreed([final_answer(text)] * 3, 2) == []


@pytest.mark.parametrize("part", ["[", "\n{", "}\n", "```\n", "\\boxed{", "answer ", "<think>", "final ", "9"])
@pytest.mark.parametrize("end", ["", "}", "\n```"])
def test_hostile_text_is_only_text(part: str, end: str) -> None:
    text = 100_000 * part + end
    assert final_answer(text) == final_answer(text)


def body(content: str | None = None, finish: str = "stop", calls: list[tuple[str, str]] | None = None) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls is not None:
        message["tool_calls"] = [
            {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}]}).encode()


def test_calls_of_tools_agree_by_name_and_arguments_alone() -> None:
    one = said(body(calls=[("pay", '{"to": "bob", "amount": 5}')]))
    assert one == said(body("Paying.", "tool_calls", [("pay", '{"amount":5,"to":"bob"}')])) is not None
    others = [[("pay", '{"to": "bob", "amount": 6}')], [("owe", '{"to": "bob", "amount": 5}')], []]
    assert one not in [said(body(calls=calls)) for calls in others]
    assert said(body(calls=[("pay", '{"to": ')])) is None, "arguments that cannot be read"


@pytest.mark.parametrize(
    "answer", [body("64", "length"), body("64", "content_filter"), body(None), b"", b"{}", b'{"choices": [1]}', b"[]"]
)
def test_what_is_no_whole_answer_comes_to_nothing(answer: bytes) -> None:
    assert said(body("64")) == "64"
    assert said(answer) is None


def test_so_many_must_give_the_same() -> None:
    assert agreed(["1", "2", None, "1"], 2) == [0, 3]
    assert agreed(["1", "2", None, None], 2) == []
    assert agreed(["1", "1", "2"], 3) == []
