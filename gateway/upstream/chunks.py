"""The chunks of a streamed completion: what the ledger must know of each, and nothing else of it is made.

Most chunks of a stream differ in one word alone. What stands around it is learnt from one of them, and the next is
known by its head and its tail, in a fraction of the time of decoding it.
"""

import re

import msgspec

from gateway.ledger.settle import Usage, WireUsage
from gateway.upstream.tool_calls import ToolCallOrder, ToolCallPiece, renumbered
from gateway.upstream.types import Event, Pattern, StreamState, UpstreamError


class _Function(msgspec.Struct):
    arguments: str | None = None


class _ToolCall(ToolCallPiece):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    """Instead of a delta, in a text completion."""
    finish_reason: str | None = None


ABSENT = msgspec.Raw(b"null")
"""(`Raw | None` is read by msgspec as None alone.)"""


class Timings(msgspec.Struct):
    """llama.cpp's own count of the prompt's tokens that it had in its cache."""

    cache_n: int | None = None


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
            size += _utf8_bytes(choice.text)
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


def _text_bytes(delta: _Delta) -> int:
    size = 0
    for text in (delta.content, delta.reasoning_content, delta.reasoning, delta.refusal):
        if text:
            size += _utf8_bytes(text)
    for call in delta.tool_calls or ():
        if call.function is not None and call.function.arguments:
            size += _utf8_bytes(call.function.arguments)
    return size


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


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
