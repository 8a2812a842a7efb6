"""The event reader, fed as networks feed: cut anywhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.settle import Usage
from gateway.upstream.sse import SseReader, read_chunk, write_event
from gateway.upstream.types import StreamState, UpstreamError

NEWLINES = st.sampled_from(["\n", "\r\n", "\r"])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1, max_size=20)


def read_cut(data: bytes, cuts: list[int]) -> list[bytes]:
    reader, out, at = SseReader(), [], 0
    for cut in sorted({c % (len(data) + 1) for c in cuts} | {len(data)}):
        out += reader.feed(data[at:cut])
        at = cut
    return out + reader.close()


@given(st.lists(TEXT, max_size=6), NEWLINES, st.lists(st.integers(0, 10**6), max_size=30))
def test_events_come_out_whole_however_they_are_cut(texts: list[str], newline: str, cuts: list[int]) -> None:
    data = "".join(f"data: {json.dumps(text)}{newline}{newline}" for text in texts).encode()
    assert [json.loads(payload) for payload in read_cut(data, cuts)] == texts


def test_every_single_cut_of_a_real_stream() -> None:
    data = 'data: {"a":"é🌊"}\r\n\r\n: comment\n\nevent: x\ndata: 1\ndata: 2\n\ndata:[DONE]\n\n'.encode()
    for cut in range(len(data) + 1):
        assert read_cut(data, [cut]) == ['{"a":"é🌊"}'.encode(), b"1\n2", b"[DONE]"]


def test_an_unterminated_last_event_is_read() -> None:
    assert read_cut(b"data: [DONE]", []) == [b"[DONE]"]
    assert read_cut(b"data: 1\n\n", [3, 5]) == [b"1"]
    assert read_cut(b"", []) == []


def test_an_endless_event_is_refused() -> None:
    reader = SseReader()
    assert reader.feed(b"data: " + b"x" * (15 << 20)) == []
    with pytest.raises(UpstreamError, match="more than"):
        reader.feed(b"x" * (2 << 20))


def test_a_chunk_is_noted_in_the_streams_state() -> None:
    state = StreamState()
    for chunk in (
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "é"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ):
        event = read_chunk(json.dumps(chunk).encode(), state, choices=2)
        assert event is not None
        assert not event.usage_only
    assert (state.delivered_bytes, state.deltas, state.done) == (4, 2, False), "the second choice is not finished"
    last = b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}'
    event = read_chunk(last, state, choices=2)
    assert event is not None
    assert event.usage_only
    assert state.usage == Usage(input=5, output=7)
    assert read_chunk(b"[DONE]", state, choices=2) is None
    assert state.done
    assert write_event(last) == b"data: " + last + b"\n\n"


@pytest.mark.parametrize(
    "data", [b"{", b'"x"', b'{"choices":7}', b'{"error":{"message":"no"}}', b'{"error":"no"}', b"\xff"]
)
def test_what_is_no_chunk_ends_the_stream_as_an_error(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        read_chunk(data, StreamState(), choices=1)
