"""The chunks of a streamed completion: what the ledger must know of each, and nothing else of it is made.

Most chunks of a stream differ in one word alone. What stands around it is learnt from one of them, and the next is
known by its head and its tail, in a fraction of the time of decoding it.
"""

import re
from typing import Any

import msgspec

from gateway.ledger.settle import Usage, WireUsage
from gateway.upstream.tool_calls import ToolCallOrder, ToolCallPiece, renumbered
from gateway.upstream.types import Event, Pattern, StreamState, UpstreamError


class _ToolCall(ToolCallPiece):
    function: Any = None
    custom: Any = None


class _Delta(msgspec.Struct):
    """What is said may have any shape: mostly a text, but content may come in parts, and a call is an object."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: list[_ToolCall] | None = None
    function_call: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: Any = None
    """Instead of a delta, in a text completion."""
    finish_reason: str | None = None


class _WholeChoice(msgspec.Struct):
    message: _Delta | None = None
    text: Any = None


class _Whole(msgspec.Struct):
    choices: list[_WholeChoice] | None = None


ABSENT = msgspec.Raw(b"null")
"""(`Raw | None` is read by msgspec as None alone.)"""


class Timings(msgspec.Struct):
    """llama.cpp's own count of the prompt's tokens that it had in its cache."""

    cache_n: Any = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: WireUsage | None = None
    timings: Timings | None = None
    error: msgspec.Raw = ABSENT


class _RawUsageChunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
"""Each stands for itself in a JSON string."""
_WORDS = re.compile(rb'"(content|reasoning_content|reasoning|text)": ?"([ -!#-\[\]-~]+)"')
MAX_PATTERN_BYTES = 4096

_chunk_decoder = msgspec.json.Decoder(_Chunk)
_raw_usage_decoder = msgspec.json.Decoder(_RawUsageChunk)
_usage_decoder = msgspec.json.Decoder(WireUsage | None)
_whole_decoder = msgspec.json.Decoder(_Whole)
_encode = msgspec.json.Encoder().encode


def read_chunk(data: bytes, state: StreamState, choices: int) -> Event | None:
    """Note in `state` what one chunk carries; None for the terminator.

    Raises UpstreamError when the chunk is not one, or carries an error: that stream must not end as a success.
    """
    pattern = state.pattern
    if pattern is not None and data.startswith(pattern.head) and data.endswith(pattern.tail):
        said = pattern.words(data)
        if said and not said.translate(None, _PLAIN):
            state.delivered_bytes += len(said)
            state.deltas += 1
            return Event(data, pattern=pattern)
    if data.startswith(b"[DONE]"):
        state.done = True
        return None
    chunk: _Chunk | _RawUsageChunk
    try:
        if not data.isascii():
            data.decode()  # the decoder looks into the strings of the fields it knows alone
        try:
            chunk = _chunk_decoder.decode(data)
        except msgspec.ValidationError:
            chunk = _raw_usage_decoder.decode(data)  # a usage of a shape that we do not know must not end the answer
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamError(
            "bad_answer", f"a chunk that is no chat completion chunk: {error}", may_be_billed=True
        ) from error
    if chunk.error != ABSENT:
        words = error_message(bytes(chunk.error))
        raise UpstreamError("cut", "the stream carried an error: " + words, may_be_billed=True, words=words)
    moved: list[tuple[int, list[int]]] = []
    size = 0
    for place, choice in enumerate(chunk.choices or ()):
        size = _text_bytes(choice.delta) if choice.delta is not None else 0
        if choice.delta is not None and choice.delta.tool_calls:
            order = state.tool_calls.setdefault(choice.index, ToolCallOrder())
            indexes = [order.place(call) for call in choice.delta.tool_calls]
            if indexes != [call.index for call in choice.delta.tool_calls]:
                moved.append((place, indexes))
        if choice.text:
            size += _size(choice.text)
        if size:
            state.delivered_bytes += size
            state.deltas += 1
        if choice.finish_reason:
            state.finished_choices.add(choice.index)
            if len(state.finished_choices) >= choices:
                state.done = True
    if moved:
        data = renumbered(data, moved)
    usage = chunk.usage
    if usage is None or usage == ABSENT:
        if state.patterns_left and size and not moved:
            state.patterns_left -= 1
            state.pattern = pattern_of(data)
            return Event(data, pattern=state.pattern)
        return Event(data)
    if isinstance(chunk, _Chunk):
        state.usage = chunk.usage.split(chunk.timings.cache_n if chunk.timings else None) if chunk.usage else None
    else:
        state.usage = read_usage(chunk.usage)
    return Event(data, usage_only=not chunk.choices)


def pattern_of(data: bytes) -> Pattern | None:
    """The pattern of a chunk of one choice that carries plain words of text and nothing else that counts or that has to
    be gathered chunk by chunk; None of any other, or where it cannot be told by a trial which words they are."""
    if len(data) > MAX_PATTERN_BYTES:
        return None
    for found in _WORDS.finditer(data):
        name = found[1].decode()
        pattern = Pattern(data[: found.start(2)], data[found.end(2) :])
        try:
            chunk, other = msgspec.json.decode(data), msgspec.json.decode(pattern.around(found[2] + b"?"))
            (choice,) = chunk["choices"]
            said = choice if name == "text" else choice["delta"]
            said[name] += "?"
            says = {key for key, value in choice.items() if value} | {key for key, value in said.items() if value}
        except (msgspec.DecodeError, RecursionError, LookupError, TypeError, ValueError, AttributeError):
            return None
        if chunk == other and says <= {"index", "delta", "role", name}:
            return pattern
    return None


def said_bytes(body: bytes) -> int:
    """UTF-8 bytes of generated text in a whole answer; of one in a shape that we do not know, no less than them."""
    try:
        choices = _whole_decoder.decode(body).choices or ()
    except msgspec.ValidationError:
        return len(body)
    return sum(
        (_text_bytes(choice.message) if choice.message is not None else 0) + _size(choice.text) for choice in choices
    )


def _text_bytes(delta: _Delta) -> int:
    size = 0
    for said in (
        delta.content, delta.reasoning_content, delta.reasoning, delta.refusal, delta.function_call, delta.audio,
    ):  # fmt: skip
        if said:
            size += _size(said)
    for call in delta.tool_calls or ():
        size += _size(call.function) + _size(call.custom)
    return size


def _size(said: Any) -> int:
    """UTF-8 bytes of a text, or of the texts in an object; of other shapes those of their JSON."""
    if isinstance(said, str):
        return len(said) if said.isascii() else len(said.encode("utf-8", "surrogatepass"))
    if isinstance(said, dict):
        return sum(_size(part) if isinstance(part, str) else len(_encode(part)) for part in said.values() if part)
    return len(_encode(said)) if said else 0


def read_usage(raw: msgspec.Raw) -> Usage | None:
    """A usage that may have any shape; one that we do not know is as good as none given."""
    try:
        usage = _usage_decoder.decode(raw)
    except msgspec.DecodeError:
        return None
    return usage.split() if usage is not None else None


def error_message(raw: bytes) -> str:
    """The words of an upstream's `error` value, which may be an object or a string."""
    try:
        error = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "unreadable"
    if isinstance(error, dict):
        error = error.get("message")
    return str(error)[:300]
