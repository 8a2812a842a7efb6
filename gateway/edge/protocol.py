"""HTTP/1.1 as `leadline serve` speaks it: uvicorn's httptools protocol, with bounds on what a client may do to it.

uvicorn has no deadline for headers or bodies, no cap on headers, and waits without end for a reader that takes
nothing. Here one timer per connection looks after all of these; it re-arms itself, so that a request pays for a few
assignments and for no timer of its own.
"""

import asyncio
import re
import urllib.parse
from typing import Any, ClassVar, Literal

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.edge.exchange import Exchange

_UPGRADE = re.compile(rb"\r\nupgrade([ \t]*:)", re.IGNORECASE)
Phase = Literal["idle", "headers", "body"]


class GuardedProtocol(HttpToolsProtocol):
    """The bounds are class attributes: a test, or an operator's own server, may subclass."""

    HEADERS_TIMEOUT_S: ClassVar[float] = 15.0
    """From a request's first byte (or the connection's opening) to the end of its headers."""
    BODY_GRACE_S: ClassVar[float] = 10.0
    MIN_BODY_BYTES_PER_S: ClassVar[int] = 1024
    """A body that comes more slowly than this, after the grace, is not waited for."""
    WRITE_STALL_S: ClassVar[float] = 60.0
    """A reader that takes nothing of its answer for so long is cut off."""
    DISCARD_S: ClassVar[float] = 2.0
    """How long the rest of a body is read and thrown away once its request has been answered."""
    MAX_HEADER_BYTES: ClassVar[int] = 64 << 10
    MAX_HEADERS: ClassVar[int] = 100

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: Phase = "headers"
        self._since = self.loop.time()
        """When the phase began; of `idle`, when the last answer ended."""
        self._came = 0
        """Bytes of the phase so far."""
        self._chunk = 0
        self._stalled_since: float | None = None
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._too_large = False
        self._ahead: RequestResponseCycle | None = None
        """Being answered while `cycle`, pipelined, waits; None: `cycle` is the one being answered."""
        self._unwritten = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self.HEADERS_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        for exchange in (self._ahead, self.cycle):
            if isinstance(exchange, Exchange) and not exchange.response_complete:
                exchange.hang_up()

    # what comes in --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._phase == "idle":
            self._enter("headers")
        if self._phase == "headers" and b"pgrade" in data:
            data = _without_upgrade(data)
        self._chunk = len(data)
        self._came += self._chunk
        super().data_received(data)
        if self._phase == "headers" and self._came > self.MAX_HEADER_BYTES and not self.transport.is_closing():
            self._too_large = True  # its end is not in sight, and nothing of it has reached `self.headers` yet
            self.send_400_response("")

    def on_message_begin(self) -> None:
        if self._phase == "idle":  # pipelined, in the chunk that ended the request before it
            self._enter("headers")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        # Looked at closely only where so much came at once that they can be too large.
        suspect = max(self._came, self._chunk) > self.MAX_HEADER_BYTES
        if len(self.headers) > self.MAX_HEADERS or (suspect and self._header_bytes() > self.MAX_HEADER_BYTES):
            self._too_large = True
            raise ValueError("the headers are too large")  # httptools hands it to data_received, which answers
        http_version = self.parser.get_http_version()
        if self.parser.should_upgrade() or http_version not in ("1.1", "1.0"):
            raise ValueError("another protocol: where its message ends is not ours to know")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise ValueError("a transfer encoding that is not undone here")
        self._enter("body")
        self._begin_exchange(http_version)

    def _begin_exchange(self, http_version: str) -> None:
        """As uvicorn's `on_headers_complete`, with an exchange of ours."""
        parser, scope = self.parser, self.scope
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = http_version
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        before = self.cycle
        self.cycle = exchange = Exchange(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=http_version == "1.1" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        exchange.write_soon = self.write_soon
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:  # pipelined: its turn comes when the answer before it is complete
            self.flow.pause_reading()
            if not self.pipeline:
                self._ahead = before
            self.pipeline.appendleft((exchange, self.app))

    def on_message_complete(self) -> None:
        self._phase = "idle"
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for its timer of an idle connection: `_look` sees to that."""
        self.server_state.total_requests += 1
        if self._ahead is not None:
            self._ahead = self.pipeline[-1][0] if len(self.pipeline) > 1 else None
        if self.transport.is_closing():
            return
        if self._phase == "idle":
            self._since = self.loop.time()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._phase == "body" and self.cycle.response_complete:
            # answered before its end: a client that is still sending must get to hear it
            self.loop.call_later(self.DISCARD_S, self._stop_discarding, self.cycle)

    def _stop_discarding(self, answered: RequestResponseCycle) -> None:
        if self.cycle is answered and self._phase == "body":
            self.transport.abort()

    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since, self._came = phase, self.loop.time(), 0

    # what goes out --------------------------------------------------------------------------------------------------

    def write_soon(self, data: bytes) -> None:
        """Write a whole answer: at once where nobody else is being served, else at the loop's next turn.

        The answers of one turn then go out one right behind the other, and a reader of several, such as a balancer in
        front, is woken once for all of them.
        """
        if len(self.tasks) > 1:
            if not self._unwritten:
                self.loop.call_soon(self._write_now)
            self._unwritten += data
        else:
            self._write_now()
            self.transport.write(data)

    def _write_now(self) -> None:
        data, self._unwritten = self._unwritten, b""
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def shutdown(self) -> None:
        self._write_now()
        super().shutdown()

    def pause_writing(self) -> None:
        self._stalled_since, self._unsent = self.loop.time(), self.transport.get_write_buffer_size()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            kib = self.MAX_HEADER_BYTES >> 10
            self._refuse(431, f"The headers are too large: send at most {self.MAX_HEADERS}, and {kib} KiB of them.")
        else:
            self._refuse(400, "This is not a valid HTTP/1.1 request.")

    def _refuse(self, status: int, message: str) -> None:
        """The last that this connection hears. An answer under way is not written into."""
        self._write_now()
        answering = self._ahead or self.cycle
        if answering is None or answering.response_complete or not answering.response_started:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
            body = msgspec.json.encode({"error": error})
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()

    # the timer ------------------------------------------------------------------------------------------------------

    def _arm(self, wait_s: float) -> None:
        self._timer = self.loop.call_later(max(wait_s, 0.001), self._look)

    def _look(self) -> None:
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if self._stalled_since is None and unsent and self.transport.is_closing():
            self._stalled_since, self._unsent = now, unsent  # closing waits for the reader
        if self._stalled_since is not None:
            if unsent < self._unsent:  # it takes something, however slowly
                self._stalled_since = now
            self._unsent = unsent
            if now - self._stalled_since >= self.WRITE_STALL_S:
                self._slow("read")
                self.transport.abort()
                return
        if self.flow.read_paused:  # what does not come is not asked for
            self._since, self._came = now, 0
        waited = now - self._since
        if self._phase == "idle" and waited >= self.timeout_keep_alive and self._answered():
            self.transport.close()
        if self._phase == "headers" and waited >= self.HEADERS_TIMEOUT_S:
            self._cut("headers")
        elif self._phase == "body" and waited >= self.BODY_GRACE_S and self._came < self.MIN_BODY_BYTES_PER_S * waited:
            self._cut("body")
        self._arm(self._next_look(waited))

    def _answered(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _next_look(self, waited: float) -> float:
        waits = [self.HEADERS_TIMEOUT_S, self.timeout_keep_alive]
        if self._phase == "headers":
            waits.append(self.HEADERS_TIMEOUT_S - waited)
        elif self._phase == "body":
            waits.append(max(self.BODY_GRACE_S - waited, 1.0))
        elif self._answered() and not self.transport.is_closing():
            waits.append(self.timeout_keep_alive - waited)
        if self._stalled_since is not None:
            waits.append(self.WRITE_STALL_S / 4)
        return min(waits)

    def _cut(self, phase: Literal["headers", "body"]) -> None:
        if self.transport.is_closing():
            return
        self._slow(phase)
        self._refuse(408, f"The request's {phase} did not come in time.")

    def _slow(self, phase: Literal["headers", "body", "read"]) -> None:
        told = getattr(self.app, "slow_client", None)
        if told is not None:
            told(phase)


def _without_upgrade(data: bytes) -> bytes:
    """A request's first bytes without its offer to speak another protocol, which is ours to ignore (RFC 9110, 7.8).

    Java's HTTP client makes that offer on every plain connection; httptools would then give up the body. An offer
    that comes in pieces is not seen here, and its request is refused.
    """
    end = data.find(b"\r\n\r\n")
    head, rest = (data, b"") if end < 0 else (data[:end], data[end:])
    return _UPGRADE.sub(rb"\r\nx-no-up\1", head) + rest
