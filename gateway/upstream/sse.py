"""Server-sent events, read and written in the subset that model servers speak (WHATWG HTML, 9.2)."""

import msgspec

from gateway.ledger.settle import Usage, WireUsage
from gateway.upstream.tool_calls import ToolCallOrder, ToolCallPiece, renumbered
from gateway.upstream.types import Event, StreamState, UpstreamError

MAX_EVENT_BYTES = 16 << 20
DONE = b"data: [DONE]\n\n"
_BOM = b"\xef\xbb\xbf"


class SseReader:
    """Cuts a byte stream into the `data` of its events, wherever the chunks happen to be cut."""

    def __init__(self) -> None:
        self._rest = bytearray()
        """The beginning of an event, its lines ended by LF alone."""
        self._start: bytes | None = b""
        """What may be the beginning of a byte order mark; None once the stream has begun."""
        self._skip_lf = False
        """The last byte was a CR, which has ended its line: an LF that follows it ends no other."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that `chunk` completes. Raises UpstreamError for an event beyond all bounds."""
        if self._start is not None:
            chunk = self._start + chunk
            if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._start = chunk
                return []
            self._start = None
            chunk = chunk.removeprefix(_BOM)
        if self._skip_lf or b"\r" in chunk:
            chunk = self._lf_only(chunk)
        rest = self._rest
        if not rest and chunk.endswith(b"\n\n"):  # nearly always: whole events
            events = chunk[:-2].split(b"\n\n")
        else:
            searched = max(0, len(rest) - 1)
            rest += chunk
            end = rest.rfind(b"\n\n", searched)
            if end < 0:
                if len(rest) > MAX_EVENT_BYTES:
                    words = f"an event of more than {MAX_EVENT_BYTES} bytes"
                    raise UpstreamError("bad_answer", words, may_be_billed=True)
                return []
            events = bytes(rest[:end]).split(b"\n\n")
            del rest[: end + 2]
        return [payload for event in events if (payload := _data_of(event))]

    def close(self) -> list[bytes]:
        """What an unterminated last event held."""
        rest = (self._start or b"") + bytes(self._rest)
        self._rest.clear()
        payload = _data_of(rest)
        return [payload] if payload else []

    def _lf_only(self, chunk: bytes) -> bytes:
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if chunk.endswith(b"\r"):
            self._skip_lf = True
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


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


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_raw_usage_decoder = msgspec.json.Decoder(_RawUsageChunk)
_usage_decoder = msgspec.json.Decoder(WireUsage | None)


def read_chunk(data: bytes, state: StreamState, choices: int) -> Event | None:
    """Note in `state` what one chunk carries; None for the terminator.

    Raises UpstreamError when the chunk is not one, or carries an error: that stream must not end as a success.
    """
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
        return Event(data)
    if isinstance(chunk, _Chunk):
        state.usage = chunk.usage.split(chunk.timings.cache_n if chunk.timings else None) if chunk.usage else None
    else:
        state.usage = read_usage(chunk.usage)
    return Event(data, usage_only=not chunk.choices)


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
