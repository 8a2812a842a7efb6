"""Chunks that are known by their pattern count, and are gathered, as if each had been decoded."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.settle import Usage
from gateway.upstream.chunks import pattern_of, read_chunk
from gateway.upstream.gather import Kept, as_stream, gather
from gateway.upstream.types import Event, StreamState, UpstreamError

WORDS = st.one_of(
    st.text("abc .,{}[]:1", max_size=6), st.text(max_size=4), st.sampled_from(['"', "\\", "a\nb", "é", ""])
)
NOTHING: st.SearchStrategy[dict[str, Any]] = st.just({})
DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, WORDS),
    st.builds(lambda text: {"content": text}, st.sampled_from(["one", "two", " "])),
    st.builds(lambda text: {"reasoning_content": text}, WORDS),
    st.builds(lambda text, thought: {"content": text, "reasoning_content": thought}, WORDS, WORDS),
    st.builds(lambda text: {"role": "assistant", "content": text}, WORDS),
    st.builds(lambda text: {"content": text, "refusal": None}, WORDS),
    st.just({"content": "x", "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}),
)
LOGPROBS = st.one_of(st.none(), st.none(), st.just({"content": [{"token": "x", "logprob": -0.5, "top_logprobs": []}]}))


def chunk(delta: dict[str, Any], logprobs: Any, finish: str | None, more: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    } | more


CHUNKS = st.builds(
    chunk,
    DELTAS,
    LOGPROBS,
    st.sampled_from([None] * 9 + ["stop"]),
    st.one_of(NOTHING, NOTHING, st.just({"obfuscation": "abc"}), st.just({"usage": None})),
)


def read(chunks: list[bytes], patterns: int) -> tuple[StreamState, list[Event]]:
    state = StreamState(patterns_left=patterns)
    events = [event for data in chunks if (event := read_chunk(data, state, 1)) is not None]
    state.pattern, state.patterns_left, state.tool_calls = None, 0, {}
    return state, events


@given(st.lists(CHUNKS, max_size=12), st.booleans())
def test_a_pattern_changes_nothing_that_is_told_counted_or_kept(chunks: list[dict[str, Any]], spaced: bool) -> None:
    raw = [msgspec.json.encode(chunk) for chunk in chunks]
    if spaced:
        raw = [msgspec.json.format(data, indent=0) for data in raw]
    (state, events), (plain_state, plain) = read(raw, 8), read(raw, 0)
    assert state == plain_state
    assert [event.data for event in events] == [event.data for event in plain]
    kept = Kept()
    for event in events:
        kept.add(event)
    assert gather(kept.chunks()) == gather([event.data for event in plain])


def test_an_answer_that_is_cut_off_after_its_count_is_billed_by_it() -> None:
    """As where a connection breaks before `[DONE]`. A count that came before the end is not the whole count."""
    state = StreamState()
    usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    read_chunk(msgspec.json.encode(chunk({"content": "a"}, None, None, usage)), state, 1)
    assert state.so_far() is None
    read_chunk(msgspec.json.encode(chunk({}, None, "stop", {})), state, 1)
    read_chunk(msgspec.json.encode({"choices": []} | usage), state, 1)
    assert state.so_far() == Usage(7, output=5)


@pytest.mark.parametrize(
    ("delta", "size"),
    [
        ({"content": [{"type": "text", "text": "abc"}]}, 30),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "é"}]}]}, 60),
        ({"reasoning": {"summary": "abc"}}, 3),
        ({"tool_calls": [{"index": 0, "id": "a", "custom": {"name": "f", "input": "SELECT"}}]}, 7),
        ({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]}, 8),
        ({"function_call": {"name": "f", "arguments": "{}"}}, 3),
        ({"audio": {"data": "AAAA", "transcript": "hi"}}, 6),
        ({"audio": "AAAA"}, 4),
        ({"content": None, "function_call": None, "audio": None, "tool_calls": None}, 0),
    ],
)
@pytest.mark.parametrize("usage", [None, 7], ids=["no usage", "odd usage"])
def test_what_is_said_in_any_shape_passes_and_counts(delta: dict[str, Any], size: int, usage: Any) -> None:
    state, data = StreamState(), msgspec.json.encode(chunk(delta, None, None, {"usage": usage}))
    event = read_chunk(data, state, 1)
    assert event is not None
    assert (event.data, event.pattern) == (data, state.pattern)
    assert size <= state.delivered_bytes <= 2 * size
    assert state.deltas == (size > 0)


def test_an_odd_detail_of_a_streams_usage_costs_no_count() -> None:
    for cached, cache_n, expected in ((4.0, None, Usage(6, 4, output=5)), ("4", 3.0, Usage(7, 3, output=5))):
        usage = {"prompt_tokens": 10.0, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": cached}}
        state = StreamState()
        read_chunk(msgspec.json.encode({"choices": [], "usage": usage, "timings": {"cache_n": cache_n}}), state, 1)
        assert state.usage == expected


def test_content_in_parts_is_not_put_together() -> None:
    parts = [chunk({"content": [{"type": "text", "text": text}]}, None, None, {}) for text in "ab"]
    assert gather([msgspec.json.encode(part) for part in parts]) is None


def test_what_an_answer_tells_beside_its_words_is_in_its_stream() -> None:
    beside = {"system_fingerprint": "fp", "service_tier": "default", "citations": ["https://a"]}
    more = {"stop_reason": "x", "content_filter_results": {"hate": {"filtered": False}}}
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "logprobs": None, "finish_reason": "stop"}
    whole = {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": {"prompt_tokens": 1},
        "choices": [choice | more],
    }  # fmt: skip
    *chunks, last = [msgspec.json.decode(data) for data in as_stream(msgspec.json.encode(whole | beside))]
    for told in (*chunks, last):
        assert told["object"] == "chat.completion.chunk"
        assert told | beside == told
    assert ["usage" in told for told in (*chunks, last)] == [False, False, True]
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"} | more]


def test_words_of_one_pattern_are_kept_as_one_chunk() -> None:
    raw = [msgspec.json.encode(chunk({"content": f"word {number} "}, None, None, {})) for number in range(50)]
    kept = Kept()
    for event in read(raw, 8)[1]:
        kept.add(event)
    assert kept.chunks() == [
        msgspec.json.encode(chunk({"content": "".join(f"word {n} " for n in range(50))}, None, None, {}))
    ]
    assert kept.size < len(raw[0]) * 4


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices":[{"index":0,"delta":{"content":"a","content":"b"}}],"note":{"content":"a"}}',
        b'{"note":{"content":"a"},"choices":[{"index":0,"delta":{"content":"b"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{"content":"b"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[]}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a","annotations":[1]}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a"},"stop_reason":"a"}]}',
    ],
)
def test_what_more_is_told_than_a_word_makes_no_pattern_of_it(data: bytes) -> None:
    found = pattern_of(data)
    assert found is None or msgspec.json.decode(found.around(b"z"))["choices"][0]["delta"]["content"] == "z"
    assert found is None or b'"note"' in data


def test_words_are_looked_at_however_well_head_and_tail_fit() -> None:
    state = StreamState()
    read_chunk(msgspec.json.encode(chunk({"content": "a"}, None, None, {})), state, 1)
    pattern = state.pattern
    assert pattern is not None
    for words in (b'"', b"\\", b"\x01", b"\xff"):
        with pytest.raises(UpstreamError):
            read_chunk(pattern.around(words), state, 1)
    event = read_chunk(pattern.around(b'b","role":"assistant'), state, 1)
    assert event is not None
    assert event.pattern is not pattern
    assert state.delivered_bytes == 2


def test_a_field_beside_the_text_that_says_the_same_is_not_taken_for_it() -> None:
    """Whatever the text is that the pattern is learnt from: trials put other words in its place."""
    for word in ("?", "one"):
        first, then = (
            msgspec.json.encode({"about": {"content": other}, "choices": [{"index": 0, "delta": {"content": word}}]})
            for other in (word, "longer")
        )
        state, _ = read([first, then], 8)
        assert (state.delivered_bytes, state.deltas) == (2 * len(word), 2)
