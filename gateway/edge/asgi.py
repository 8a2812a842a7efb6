"""The data plane speaks ASGI directly: no framework object is built per request (docs/decisions.md has the numbers)."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

import msgspec

from gateway.edge.exchange import exchange_of
from gateway.errors import BodyTooLarge, InvalidRequest, LeadlineError
from gateway.header_lines import Pairs, lines_of, pairs_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_TIMEOUT_S = 30.0
"""How long a caller may take to send its body."""
_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The caller hung up before its request was read."""


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Raises BodyTooLarge as soon as the size is known, InvalidRequest for a body that does not arrive, ClientGone."""
    exchange = exchange_of(receive)
    body = exchange.take_body() if exchange is not None else None
    if body is not None:
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError as error:
        raise InvalidRequest(f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from error


def limited(receive: Receive, max_bytes: int) -> Receive:
    """`receive`, raising BodyTooLarge once more than `max_bytes` of body have come."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise BodyTooLarge(f"The body is larger than {max_bytes >> 20} MiB, which is all that this path takes.")
        return message

    return receive_limited


def new_request_id() -> bytes:
    """For answers that have no row in the ledger."""
    return b"req_" + os.urandom(12).hex().encode()


def identified(send: Send) -> Send:
    """`send`, giving the answer an `x-request-id`."""

    async def send_identified(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", new_request_id())]
        await send(message)

    return send_identified


def error_headers(error: LeadlineError) -> Pairs:
    """What an error's answer says beside its body."""
    headers = [*error.headers, (b"x-should-retry", b"true" if error.should_retry else b"false")]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(error.retry_after_s * 1000)))
    return headers


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body is larger than {max_bytes >> 20} MiB. Send less, or raise LEADLINE_MAX_BODY_MIB on the gateway."
    )


class AsgiReply:
    """One HTTP answer, whole or as server-sent events. `headers` are lines (`gateway.header_lines`)."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.exchange = exchange_of(send)
        self._streaming = False
        self.complete = False
        """The whole answer has been handed to the server."""

    async def whole(self, status: int, headers: bytes, body: bytes) -> None:
        headers = b"content-type: application/json\r\ncontent-length: %d\r\n%b" % (len(body), headers)
        exchange = self.exchange
        if exchange is not None and exchange.direct:
            self.complete = True
            await exchange.respond(status, headers, body)
            return
        await self._send({"type": "http.response.start", "status": status, "headers": pairs_of(headers)})
        self.complete = True
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, headers: bytes) -> None:
        self._streaming = True
        headers = _STREAM + headers
        if self.exchange is not None and self.exchange.direct:
            await self.exchange.begin_stream(headers)
            return
        self.exchange = None  # it has to tell that it closes: all of the answer goes by `send`
        await self._send({"type": "http.response.start", "status": 200, "headers": pairs_of(headers)})

    @property
    def ready(self) -> bool:
        """Whether a stream that has begun may go on by `send_now`."""
        return self.exchange is not None and self.exchange.ready

    def send_now(self, data: bytes) -> None:
        """As `send`, without waiting for anything; only while `ready`."""
        assert self.exchange is not None
        self.exchange.write_now(data)

    async def send(self, data: bytes) -> None:
        if self.exchange is not None:
            await self.exchange.write_chunk(data)
            return
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        self.complete = True
        if self.exchange is not None:
            await self.exchange.end_stream()
            return
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: LeadlineError, headers: bytes, comment: bytes = b"") -> None:
        body = _encode(error.body())
        if self._streaming:
            await self.send(b"data: " + body + b"\n\n" + comment)
            await self.end()
            return
        await self.whole(error.http_status, headers + lines_of(error_headers(error)), body)


async def until_gone(receive: Receive, reply: AsgiReply, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` in this task, and cancel it when the caller hangs up before its answer is complete."""
    here = asyncio.current_task()
    assert here is not None
    gone = False
    exchange = exchange_of(receive)
    watching: asyncio.Task[None] | None = None

    def leave() -> None:
        nonlocal gone
        if not reply.complete:
            gone = True
            here.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    if exchange is None:
        watching = asyncio.create_task(watch())
    elif exchange.disconnected:
        work.close()
        raise ClientGone
    else:
        exchange.listen(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not gone:
            raise
        here.uncancel()
    finally:
        if watching is not None:
            watching.cancel()
        elif exchange is not None:
            exchange.on_disconnect = None
