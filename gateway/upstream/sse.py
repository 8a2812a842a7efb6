"""Server-sent events, read and written in the subset that model servers speak (WHATWG HTML, 9.2)."""

import msgspec

from gateway.ledger.settle import WireUsage
from gateway.upstream.types import Event, StreamState, UpstreamError

MAX_EVENT_BYTES = 16 << 20
DONE = b"data: [DONE]\n\n"


class SseReader:
    """Cuts a byte stream into the `data` of its events, wherever the chunks happen to be cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that `chunk` completes. Raises UpstreamError for an event beyond all bounds."""
        data = self._rest + chunk if self._rest else chunk
        if b"\r" in data:
            # A lone CR at the very end may be half of a CRLF: it waits for the next chunk.
            tail = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(tail)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + tail
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamError("bad_answer", f"an event of more than {MAX_EVENT_BYTES} bytes", may_be_billed=True)
        return [payload for event in events if (payload := _data_of(event)) is not None]

    def close(self) -> list[bytes]:
        """What an unterminated last event held."""
        rest, self._rest = self._rest, b""
        payload = _data_of(rest.rstrip(b"\r"))
        return [] if payload is None else [payload]


def _data_of(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def write_event(data: bytes) -> bytes:
    if b"\n" in data:  # an event of several lines stays one
        data = data.replace(b"\n", b"\ndata: ")
    return b"data: " + data + b"\n\n"


class _Function(msgspec.Struct):
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
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
    """Of a text completion."""
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: WireUsage | None = None
    error: msgspec.Raw | None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


def read_chunk(data: bytes, state: StreamState, choices: int) -> Event | None:
    """Note in `state` what one chunk carries; None for the terminator.

    Raises UpstreamError when the chunk is not one, or carries an error: that stream must not end as a success.
    """
    if data == b"[DONE]":
        state.done = True
        return None
    try:
        chunk = _chunk_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamError(
            "bad_answer", f"a chunk that is no chat completion chunk: {error}", may_be_billed=True
        ) from error
    if chunk.error is not None and bytes(chunk.error) != b"null":
        raise UpstreamError(
            "cut", "the stream carried an error: " + error_message(bytes(chunk.error)), may_be_billed=True
        )
    for choice in chunk.choices or ():
        size = _text_bytes(choice.delta) if choice.delta is not None else 0
        if choice.text:
            size += len(choice.text.encode("utf-8", "surrogatepass"))
        if size:
            state.delivered_bytes += size
            state.deltas += 1
        if choice.finish_reason:
            state.finished_choices.add(choice.index)
            if len(state.finished_choices) >= choices:
                state.done = True
    if chunk.usage is not None:
        state.usage = chunk.usage.split()
    return Event(data, usage_only=chunk.usage is not None and not chunk.choices)


def _text_bytes(delta: _Delta) -> int:
    size = 0
    for text in (delta.content, delta.reasoning_content, delta.reasoning, delta.refusal):
        if text:
            size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    for call in delta.tool_calls or ():
        if call.function is not None and call.function.arguments:
            size += len(call.function.arguments.encode("utf-8", "surrogatepass"))
    return size


def error_message(raw: bytes) -> str:
    """The words of an upstream's `error` value, which may be an object or a string."""
    try:
        error = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "unreadable"
    if isinstance(error, dict):
        error = error.get("message")
    return str(error)[:300]
