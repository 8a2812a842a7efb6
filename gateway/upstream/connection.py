"""One HTTP/1.1 connection to an upstream, one exchange at a time: bytes in, bytes out, time kept.

llhttp (through httptools) does the framing and refuses what is not HTTP; headers are not made into objects, the few
that matter are looked up in the raw header section. Time is kept by one timer for the connection, which is only ever
brought forward: it asks what is due when it fires, so that an exchange that goes well touches no timer at all.

Where others ask the same server meanwhile, a request goes out at the loop's next turn, right behind theirs: a server
that sleeps is woken once for all of them (docs/decisions.md has the numbers).
"""

import asyncio
import math
import select
from collections.abc import Callable
from typing import cast

import httptools
import msgspec

from gateway.upstream.http_errors import (
    ClosedBeforeHeaders,
    ClosedInHeaders,
    ConnectRefused,
    DeadlineExceeded,
    FirstByteTimeout,
    HeadersTooLarge,
    HttpError,
    IdleTimeout,
    MalformedResponse,
    TruncatedBody,
    UnsupportedEncoding,
)

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
HIGH_WATER = 256 << 10
"""Bytes of a body that wait unread before the server is made to wait."""
WRITE_BYTES = 64 << 10
"""A longer request body goes out in pieces of this size, each when the one before has left."""
PROBE_AFTER_S = 1.0
"""A connection that was idle for longer is asked whether the server's goodbye already waits in the kernel."""
AFTER_STREAM_S = 0.05
"""So long a connection rests after a stream before it serves again, until one to its server has outlived that:
llama.cpp's closes each of them after a stream, without a word in its headers, and who asks at once asks nobody."""
MAX_DRAIN_BYTES = 64 << 10
_TICK_S = 0.001


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds: to connect, to the first byte of the body, between two reads, and the whole exchange."""

    connect_s: float
    first_byte_s: float
    idle_s: float
    total_s: float


class Connection(asyncio.Protocol):
    """`on_idle` takes it back after a drain, `on_gone` hears once that it will never serve again."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_idle: Callable[["Connection"], None],
        on_gone: Callable[["Connection"], None],
    ) -> None:
        self._loop = loop
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.closed = False
        self.exchanging = False
        self._full = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._keep_alive_until = math.inf
        self._drain_until = math.inf
        self.idle_since = 0.0
        self.reused = False
        self.streamed = False
        """Its last answer came in chunks."""
        self.after_stream = False
        """So had the answer before the one that is under way, or was last."""
        self.left = False
        """The server closed it."""
        self._reset()

    def _reset(self) -> None:
        self._raw = b""
        self._unsent = b""
        self._on_sent: Callable[[], None] | None = None
        self._begun = False
        self._paused = False
        self._uploading = False
        self._reusable = False
        self._surplus = False
        self._size = 0
        self.answered = False
        """The header section is here: `status` and `head` are set."""
        self.complete = False
        """The body has come to its end."""
        self.status = 0
        self.head = b""
        self.parts: list[bytes] = []
        self.taker: Callable[[bytes], bool] | None = None
        self.error: HttpError | None = None

    # the exchange ---------------------------------------------------------------------------------------------------

    def start(
        self,
        data: bytes,
        timeouts: Timeouts,
        deadline: float,
        *,
        head_only: bool,
        more: bool,
        crowded: bool,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Send a request's first bytes. `more`: `upload` will send the rest. `crowded`: others ask this server too.

        `on_sent` is called right before they go out.
        """
        assert self._transport is not None
        now = self._loop.time()
        self.exchanging, self.after_stream = True, self.streamed
        self._head_only = head_only
        self._uploading = more
        self._timeouts = timeouts
        self._deadline = deadline
        self._sent_at = now
        self._arm(min(deadline, now + timeouts.first_byte_s))
        self._unsent, self._on_sent = data, on_sent
        if crowded and not more:
            self._loop.call_soon(self._send)
        else:
            self._send()

    def _send(self) -> None:
        data, self._unsent = self._unsent, b""
        if data and not self.closed and self._transport is not None:
            if self._on_sent is not None:
                self._on_sent()
            self._transport.write(data)

    async def upload(self, body: bytes) -> None:
        """Send a long body piece by piece; over early when the server answers or leaves before its end."""
        assert self._transport is not None
        view = memoryview(body)
        for at in range(0, len(body), WRITE_BYTES):
            if at:
                await asyncio.sleep(0)  # the kernel takes 0.03 ms for each, and its readers may take it all at once
            while self._full and not (self.answered or self.error):
                await self.wait()
            if self.answered or self.error:
                return
            self._sent_at = self._loop.time()
            self._transport.write(view[at : at + WRITE_BYTES])
        self._uploading = False

    def hand_over(self, take: Callable[[bytes], bool]) -> asyncio.Future[None]:
        """`take` gets what arrives instead of whoever waits, until it returns False; raises what it raises."""
        self.taker = take
        return self.wait()

    def wait(self) -> asyncio.Future[None]:
        """The next thing that happens here: a read, the end, an error, room to write."""
        self._waiter = self._loop.create_future()
        return self._waiter

    def take(self) -> bytes:
        """All of the body that has arrived and was not taken; lets the server go on if it had to wait."""
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.parts = []
        self._size = 0
        if self._paused:
            self._paused = False
            if not self.closed and self._transport is not None:
                self._last = self._loop.time()
                self._transport.resume_reading()
                self._arm(min(self._deadline, self._last + self._timeouts.idle_s))
        return data

    def finish(self) -> bool:
        """End the exchange: True when the connection is fit for another, False when it had to be aborted."""
        if not self.complete or not self._reusable or self._surplus or self._uploading or self.closed:
            self.abort()
            return False
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
        self.exchanging = False
        self._drain_until = math.inf
        self._reset()
        return True

    def drain(self, seconds: float) -> None:
        """Read what little follows an answer whose reader has all it wants; then `on_idle`, or the end."""
        if self.closed:
            return
        self.take()
        self._drain_bytes = 0
        self._drain_until = self._loop.time() + seconds
        self._arm(self._drain_until)

    # rest -----------------------------------------------------------------------------------------------------------

    def rest(self, keep_alive_s: float) -> None:
        self.reused = True
        self.idle_since = self._loop.time()
        self._keep_alive_until = self.idle_since + keep_alive_s
        self._arm(self._keep_alive_until)

    @property
    def rested(self) -> bool:
        """It was idle for so long that a server that leaves after streams would have left."""
        return not self.streamed or self._loop.time() - self.idle_since >= AFTER_STREAM_S

    @property
    def left_after_stream(self) -> bool:
        """The server closed it soon after a stream, under a request that it never answered."""
        soon = self._sent_at - self.idle_since < PROBE_AFTER_S if self.after_stream else False
        return soon and isinstance(self.error, ClosedBeforeHeaders)

    def usable(self, *, trusted: bool) -> bool:
        """Whether this idle connection can take a request. Its server may have left without the loop knowing yet."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return False
        now = self._loop.time()
        if now >= self._keep_alive_until:
            return False
        if not trusted or now - self.idle_since > PROBE_AFTER_S:
            poll = select.poll()
            poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
            return not poll.poll(0)
        return True

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        self._on_gone(self)

    # asyncio's side -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)

    def data_received(self, data: bytes) -> None:
        if not self.exchanging or self.closed or self._unsent:  # nothing may come while nothing was asked
            self._ended(None)
            return
        self._last = self._loop.time()
        if not self.answered:
            self._raw += data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self.fail(MalformedResponse(f"no HTTP/1.x answer: {error}", reused=self.reused))
                return
            self._surplus = True  # the answer is whole; what came after it costs the connection
        if not self.answered and len(self._raw) > MAX_HEAD_BYTES:
            self.fail(HeadersTooLarge(f"more than {MAX_HEAD_BYTES} bytes of headers", reused=self.reused))
        elif self._drain_until != math.inf:
            self._drained(len(data))
        elif self.taker is None or not self._taken(self.taker):
            self._wake()

    def on_message_begin(self) -> None:
        if self.complete:
            self._surplus = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus or self.answered:
            return
        end = self._raw.find(b"\r\n\r\n")
        if 100 <= status < 200:  # interim: the answer itself is still to come
            self._raw = self._raw[end + 4 :] if status != 101 else self._raw
            return
        head = self._raw[: end + 2].lower()
        self.status, self.head, self._raw, self.answered = status, head, b"", True
        if len(head) > MAX_HEAD_BYTES or head.count(b"\n") > MAX_HEADERS + 1:
            words = f"more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} lines of headers"
            self.fail(HeadersTooLarge(words, reused=self.reused))
        encoding = find_header(self.head, b"content-encoding")
        transfer = find_header(self.head, b"transfer-encoding")
        self.streamed = transfer is not None
        if encoding not in (None, b"", b"identity") or transfer not in (None, b"chunked"):
            words = f"an answer in an encoding that was not asked for: {(encoding or transfer or b'')[:50]!r}"
            self.fail(UnsupportedEncoding(words, reused=self.reused))
        elif self._head_only:  # its headers tell of a body that never comes, which llhttp cannot know
            self.complete = True

    def on_body(self, data: bytes) -> None:
        if self.complete or self.error is not None:
            return
        if not self._begun:
            self._begun = True
            if self._timeouts.idle_s < self._timeouts.first_byte_s:
                self._arm(self._last + self._timeouts.idle_s)
        self.parts.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.answered and not self.complete:
            self.complete = True
            self._reusable = self._parser.should_keep_alive()

    def eof_received(self) -> None:
        self._ended(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(exc)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()

    # ends and time --------------------------------------------------------------------------------------------------

    def _ended(self, exc: Exception | None) -> None:
        """The server has closed: the end of a body that says no length of its own, an error of any other answer."""
        if self.exchanging and not self.complete and self.error is None:
            why = f": {exc}" if exc is not None and str(exc) else ""
            if self._unsent:
                self.error = ConnectRefused("closed before the request went out" + why, reused=self.reused)
            elif self.answered:
                framed = (
                    find_header(self.head, b"content-length") is not None
                    or find_header(self.head, b"transfer-encoding") is not None
                )
                if framed or exc is not None:
                    self.error = TruncatedBody("closed before the end of the body" + why, reused=self.reused)
                else:
                    self.complete = True
            elif self._raw:
                self.error = ClosedInHeaders("closed in the middle of the headers" + why, reused=self.reused)
            else:
                self.error = ClosedBeforeHeaders("closed before any answer" + why, reused=self.reused)
        self.left = True
        self.abort()
        self._wake()

    def fail(self, error: HttpError) -> None:
        """End the exchange with this error, and the connection with it."""
        if self.error is None:
            self.error = error
        self.abort()
        self._wake()

    def _taken(self, take: Callable[[bytes], bool]) -> bool:
        """Whether what has arrived was handed on, and whoever waits may go on waiting."""
        waiter = self._waiter
        if waiter is None or waiter.done() or not self.parts or self.error is not None:
            return False
        try:
            return take(self.take()) and not self.complete
        except Exception as error:
            waiter.set_exception(error)
            return False

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _drained(self, size: int) -> None:
        self.parts.clear()
        self._size = 0
        self._drain_bytes += size
        if self.complete:
            if self.finish():
                self._on_idle(self)
        elif self._drain_bytes > MAX_DRAIN_BYTES:
            self.abort()

    def _arm(self, due: float) -> None:
        """See to it that the timer fires no later than `due`."""
        if self._timer is None:
            self._timer_at = due
            self._timer = self._loop.call_at(due, self._on_timer)
        elif due < self._timer_at:
            self._timer.cancel()
            self._timer_at = due
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        due, error = self._next_due()
        if due == math.inf:
            return
        if due - self._loop.time() > _TICK_S:
            self._arm(due)
        elif error is not None:
            self.fail(error)
        else:
            self.abort()

    def _next_due(self) -> tuple[float, HttpError | None]:
        """When patience ends, and how: without an error for a connection that nobody waits for."""
        if not self.exchanging:
            return self._keep_alive_until, None
        if self._drain_until != math.inf:
            return self._drain_until, None
        if self.complete:
            return math.inf, None
        timeouts, reused = self._timeouts, self.reused
        if self._paused:  # it is we who make the server wait
            due = math.inf
        elif self._begun:
            due = self._last + timeouts.idle_s
        else:
            due = self._sent_at + timeouts.first_byte_s
        if self._deadline <= due:
            return self._deadline, DeadlineExceeded(f"not done within {timeouts.total_s:g} s", reused=reused)
        if self._begun:
            return due, IdleTimeout(f"silent for {timeouts.idle_s:g} s", reused=reused)
        return due, FirstByteTimeout(f"no answer within {timeouts.first_byte_s:g} s", reused=reused)


def find_header(head: bytes, name: bytes) -> bytes | None:
    """The first value of a header in a header section; all in lower case."""
    at = head.find(b"\n" + name + b":")
    if at < 0:
        return None
    at += len(name) + 2
    return head[at : head.index(b"\r", at)].strip()
