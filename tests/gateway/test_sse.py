"""The event reader, fed as networks feed: cut anywhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.settle import Usage
from gateway.upstream.chunks import read_chunk
from gateway.upstream.sse import SseReader, write_event
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


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (BOM + b"data: 1\n\n", [b"1"]),
        (BOM + b"\n\ndata: 1", [b"1"]),
        (b"data: 1\r\rdata: 2\r\r", [b"1", b"2"]),
        (b"data: 1\r\n\r\ndata: 2\r\n\r\n", [b"1", b"2"]),
        (b"data: 1\n\r\ndata: 2\n\r", [b"1", b"2"]),
        (b": keep-alive\n\n: again\n\ndata: 1\n\n", [b"1"]),
        (b"id: 7\nevent: x\nretry: 1\ndata: 1\n\n", [b"1"]),
        (b"data\n\ndata:\n\ndata: 1\n\n", [b"1"]),
        (b"data: [1,\ndata:2]\n\n", [b"[1,\n2]"]),
        (b"\n\n\n\ndata: 1\n\n\n\n", [b"1"]),
        (b"data: 1\ndata: 2", [b"1\n2"]),
    ],
)
def test_events_of_every_form_wherever_they_are_cut(data: bytes, events: list[bytes]) -> None:
    for cut in range(len(data) + 1):
        assert read_cut(data, [cut]) == events
    assert read_cut(data, list(range(len(data)))) == events


def test_an_event_ended_by_cr_alone_does_not_wait_for_the_next() -> None:
    assert SseReader().feed(b"data: 1\r\r") == [b"1"]


def test_a_huge_event_comes_whole() -> None:
    reader, data = SseReader(), b"x" * (8 << 20)
    stream = b"data: " + data + b"\n\ndata: 1\n\n"
    found = [event for at in range(0, len(stream), 1400) for event in reader.feed(stream[at : at + 1400])]
    assert found == [data, b"1"]


def usage_of(*chunks: bytes) -> Usage | None:
    state = StreamState()
    for chunk in chunks:
        assert read_chunk(b'{"choices":[],"usage":' + chunk + b"}", state, choices=1) is not None
    return state.usage


def test_of_two_usages_the_last_counts() -> None:
    assert usage_of(
        b'{"prompt_tokens":5,"completion_tokens":1}', b'{"prompt_tokens":5,"completion_tokens":7}'
    ) == Usage(input=5, output=7)
    assert usage_of(b'{"prompt_tokens":5,"completion_tokens":1}', b"null") == Usage(input=5, output=1)


@pytest.mark.parametrize(
    "usage",
    [b"{}", b'{"prompt_tokens":0,"completion_tokens":0}', b'{"prompt_tokens":"many"}', b"[]", b'"?"',
     b'{"prompt_tokens":-5,"completion_tokens":-1}'],
)  # fmt: skip
def test_a_usage_that_is_none_is_none_given_and_ends_no_stream(usage: bytes) -> None:
    assert usage_of(usage) is None


def test_a_text_completion_is_counted_too() -> None:
    state = StreamState()
    for text, reason in (("h\u00e9", None), ("", None), ("!", "stop")):
        chunk = {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}
        assert read_chunk(json.dumps(chunk).encode(), state, choices=1) is not None
    assert (state.delivered_bytes, state.deltas, state.done) == (4, 2, True)
