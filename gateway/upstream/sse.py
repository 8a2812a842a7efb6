"""Server-sent events, read and written in the subset that model servers speak (WHATWG HTML, 9.2)."""

from gateway.upstream.types import UpstreamError

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
            if chunk.startswith(b"data: ") and chunk.find(b"\n") == len(chunk) - 2:  # and mostly one
                return [chunk[6:-2]]
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
