"""The proof of money finds whatever was changed on any of its sides."""

import dataclasses
from typing import Any

import pytest
from demo_client import Call, Task, answers
from demo_money import Proof, prove

TASK = Task("gsm8k", "How many?", "9", recorded=(True, False))
CALL = Call("arm", TASK, False, 200, "req_1", "chatcmpl-1", "weak", "off", "", "#### 9", 7, 3, 6_000, 1.0)
CACHED = dataclasses.replace(CALL, request_id="req_2", cache="hit", cost_nanousd=0)
LOCAL = dataclasses.replace(CALL, request_id="req_3", completion_id="chatcmpl-x", model="local", cost_nanousd=0)
REFUSED = dataclasses.replace(
    CALL,
    request_id="req_4",
    completion_id="",
    status=404,
    prompt_tokens=None,
    completion_tokens=None,
    cost_nanousd=None,
)
CALLS = (CALL, CACHED, LOCAL, REFUSED)


def books() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(requests, attempts, truth) that agree with CALLS."""
    tokens = {"input_tokens": 5, "cached_input_tokens": 2, "cache_write_tokens": 0}
    tokens |= {"output_tokens": 1, "reasoning_tokens": 2}
    nothing = dict.fromkeys(tokens, 0)
    requests: list[dict[str, Any]] = [
        {"id": "req_1", "cost_nanousd": 6_000, **tokens},
        {"id": "req_2", "cost_nanousd": 0, **nothing},
        {"id": "req_3", "cost_nanousd": 0, **tokens},
        {"id": "req_4", "cost_nanousd": 0, **nothing},
    ]
    attempts: list[dict[str, Any]] = [
        {"request_id": "req_1", "upstream_status": None, "cost_nanousd": 6_000, **tokens},
        {"request_id": "req_3", "upstream_status": None, "cost_nanousd": 0, **tokens},
        {"request_id": "req_4", "upstream_status": 404, "cost_nanousd": 0, **nothing},
    ]
    billed = {"prompt_tokens": 7, "completion_tokens": 3, "nanousd": 6_000, "streamed": False}
    truth: list[dict[str, Any]] = [
        {"id": "chatcmpl-1", "status": 200, **billed},
        {
            "id": "chatcmpl-2",
            "status": 404,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "nanousd": 0,
            "streamed": False,
        },
    ]
    return requests, attempts, truth


def test_books_that_agree() -> None:
    proof = prove(CALLS, *books(), spent_nanousd=6_000)
    assert proof == Proof(calls=4, upstream_calls=2, nanousd=6_000, differences=())
    assert str(proof).endswith("4 calls (2 reached the upstream), $0.000006000")


@pytest.mark.parametrize("side", [0, 1, 2], ids=["ledger", "attempts", "upstream"])
@pytest.mark.parametrize("change", ["one nano-dollar", "one token", "a row lost"])
def test_any_change_is_found(side: int, change: str) -> None:
    sides = books()
    row = sides[side][0]
    if change == "a row lost":
        sides[side].remove(row)
    else:
        columns = ("nanousd", "completion_tokens") if side == 2 else ("cost_nanousd", "output_tokens")
        row[columns[change == "one token"]] += 1
    assert prove(CALLS, *sides, spent_nanousd=6_000).differences


@pytest.mark.parametrize("lost", range(len(CALLS)))
def test_a_call_missing_from_the_transcript_is_found(lost: int) -> None:
    assert prove([*CALLS[:lost], *CALLS[lost + 1 :]], *books(), spent_nanousd=6_000).differences


def test_a_total_that_the_api_reports_wrongly_is_found() -> None:
    assert "spend API" in prove(CALLS, *books(), spent_nanousd=6_001).differences[0]


def test_a_call_counted_twice_is_found() -> None:
    requests, attempts, truth = books()
    assert prove(CALLS, requests, attempts, [*truth, truth[0]], spent_nanousd=6_000).differences


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("#### 9", "9", True),
        ("He earns $1,200.00", "1200", True),
        ("#### 225 minutes or 3 hours", "225", True),
        ("first 9, then 8", "9", False),
        ("The answer is -3.", "-3", True),
        ("no number", "9", False),
    ],
)
def test_grading_reads_the_last_number(text: str, gold: str, right: bool) -> None:
    assert answers(text, gold) is right


def test_the_recorded_label_goes_before_the_text() -> None:
    assert CALL.correct
    assert not dataclasses.replace(CALL, model="strong").correct
    assert dataclasses.replace(CALL, model="local").correct
