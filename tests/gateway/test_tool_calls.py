"""Streamed tool calls reach the client numbered by arrival, whatever their provider's numbers are."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream.chunks import read_chunk
from gateway.upstream.gather import gather
from gateway.upstream.types import StreamState

Piece = tuple[int | None, str | None, str]
"""(index, id, arguments) as a provider sends it."""

STYLES: dict[str, list[Piece]] = {
    "as OpenAI": [(0, "a", ""), (0, None, "1"), (1, "b", ""), (1, None, "2")],
    "from one": [(1, "a", ""), (1, None, "1"), (2, "b", ""), (2, None, "2")],
    "one index for all": [(0, "a", ""), (0, None, "1"), (0, "b", ""), (0, None, "2")],
    "no index": [(None, "a", ""), (None, None, "1"), (None, "b", ""), (None, None, "2")],
    "id in every piece": [(0, "a", ""), (0, "b", ""), (0, "a", "1"), (0, "b", "2")],
    "empty ids later": [(3, "a", ""), (7, "b", ""), (3, "", "1"), (7, "", "2")],
}


def chunk(pieces: list[Piece], choice: int = 0) -> bytes:
    calls: list[dict[str, Any]] = []
    for index, id, arguments in pieces:
        call: dict[str, Any] = {"function": {"arguments": arguments}}
        if index is not None:
            call["index"] = index
        if id is not None:
            call["id"] = id
        if id:
            call |= {"type": "function", "function": {"name": f"call_{id}", "arguments": arguments}}
        calls.append(call)
    delta = {"index": choice, "delta": {"tool_calls": calls}, "finish_reason": None}
    return json.dumps({"id": "x", "created": 1, "model": "m", "choices": [delta]}).encode()


def forwarded(chunks: list[bytes]) -> list[bytes]:
    state, sent = StreamState(), []
    for data in chunks:
        event = read_chunk(data, state, 1)
        assert event is not None
        sent.append(event.data)
    return sent


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("together", [False, True], ids=["one a chunk", "all in one"])
def test_calls_stay_apart_and_are_numbered_by_arrival(style: str, together: bool) -> None:
    pieces = STYLES[style]
    calls: list[Piece] = [piece for piece in pieces if piece[1]]
    sent = forwarded([chunk(pieces)] if together else [chunk([piece]) for piece in pieces])
    end = json.dumps(
        {"id": "x", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    )
    whole = gather([*sent, end.encode()])
    assert whole is not None
    told = json.loads(whole)["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in told] == [("a", "1"), ("b", "2")]
    assert len(calls) >= 2
    if style == "as OpenAI":
        assert sent == ([chunk(pieces)] if together else [chunk([piece]) for piece in pieces]), (
            "untouched, byte by byte"
        )


@given(
    st.lists(st.tuples(st.integers(0, 4), st.text("xyz", min_size=1, max_size=3)), min_size=1, max_size=30),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_interleaving_gives_each_call_its_own_words(words: list[tuple[int, str]], offset: int, ids: bool) -> None:
    """Calls interleaved at will, numbered from `offset` or known by their ids alone."""
    seen: set[int] = set()
    chunks, expected = [], dict.fromkeys(dict.fromkeys(call for call, _ in words), "")
    for call, text in words:
        first = call not in seen
        seen.add(call)
        expected[call] += text
        chunks.append(chunk([(None if ids else call + offset, f"id{call}" if ids or first else None, text)]))
    got: dict[int, str] = {}
    for data in forwarded(chunks):
        for piece in msgspec.json.decode(data)["choices"][0]["delta"]["tool_calls"]:
            got[piece["index"]] = got.get(piece["index"], "") + piece["function"]["arguments"]
    assert got == dict(enumerate(expected.values()))


def test_choices_count_by_themselves() -> None:
    sent = forwarded([chunk([(1, "a", "")], choice=0), chunk([(1, "b", "")], choice=1)])
    assert [json.loads(data)["choices"][0]["delta"]["tool_calls"][0]["index"] for data in sent] == [0, 0]


def put_together(*pieces: dict[str, Any]) -> Any:
    """What is kept of one choice's calls, forwarded piece by piece; None: nothing is kept."""
    deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    whole = gather(forwarded([json.dumps(delta).encode() for delta in deltas]))
    return None if whole is None else json.loads(whole)["choices"][0]["message"]["tool_calls"]


def test_custom_calls_are_put_together_as_what_they_are() -> None:
    begun = {"index": 0, "id": "call_1", "type": "custom", "custom": {"name": "run_sql", "input": ""}}
    more = [{"index": 0, "custom": {"input": words}} for words in ("SELECT ", "1")]
    whole = {"id": "call_1", "type": "custom", "custom": {"name": "run_sql", "input": "SELECT 1"}}
    assert put_together(begun, *more) == [whole]
    del begun["type"]
    assert put_together(begun, *more) == [whole]


def test_what_else_a_call_carries_is_kept_with_it() -> None:
    signed = {"google": {"thought_signature": "SIG"}}
    begun = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    more = {"index": 0, "id": "", "type": None, "function": {"arguments": "}"}, "extra_content": signed}
    whole = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": signed}
    assert put_together(begun, more) == [whole]
    assert put_together(begun | {"extra_content": signed}, more) == [whole]
    assert put_together(begun | {"extra_content": {"google": "other"}}, more) is None


@pytest.mark.parametrize(
    "piece",
    [
        {"index": 0, "type": "custom", "custom": {"input": "x"}},
        {"index": 0, "function": {"arguments": {"x": 1}}},
        {"index": 0, "function": "x"},
    ],
)
def test_calls_of_a_shape_that_cannot_be_put_together_are_not_kept(piece: dict[str, Any]) -> None:
    begun = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    assert put_together(begun, piece) is None
