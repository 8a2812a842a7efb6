"""A reply that is kept while it is given, so that a repetition of its request gets the same."""

from gateway.admission.idempotency import MAX_BODY_BYTES, Claim, IdempotencyStore, Replay
from gateway.edge.asgi import AsgiReply, Send
from gateway.header_lines import lines_of

JSON_TYPE, STREAM_TYPE = "application/json", "text/event-stream"


class RecordedReply(AsgiReply):
    """Kept before its last byte goes out: whoever has the whole answer can have it again."""

    def __init__(self, send: Send, store: IdempotencyStore, claim: Claim) -> None:
        super().__init__(send)
        self._store = store
        self._claim: Claim | None = claim
        self._parts: list[bytes] = []
        self._size = 0

    async def whole(self, status: int, headers: bytes, body: bytes) -> None:
        # What ran is kept, be it an error. A refusal is not, nor a provider's rate limit: another try may fare better.
        ran = status == 200 or (status != 429 and _attempted(headers))
        if ran:
            await self._finish(status, JSON_TYPE, body)
        else:
            await self.release()
        await super().whole(status, headers, body)

    def send_now(self, data: bytes) -> None:
        self._keep(data)
        super().send_now(data)

    async def send(self, data: bytes) -> None:
        self._keep(data)
        await super().send(data)

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MAX_BODY_BYTES:
            self._parts.append(data)

    async def end(self) -> None:
        await self._finish(200, STREAM_TYPE, b"".join(self._parts) if self._size <= MAX_BODY_BYTES else None)
        await super().end()

    async def release(self) -> None:
        """Give the claim back, unless the answer has been kept."""
        claim, self._claim = self._claim, None
        if claim is not None:
            await self._store.release(claim)

    async def _finish(self, status: int, content_type: str, body: bytes | None) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            kept = body if body is not None and len(body) <= MAX_BODY_BYTES else None
            await self._store.finish(claim, status, content_type, kept)


async def replay(reply: AsgiReply, first: Replay) -> None:
    """The first answer again, under its own request id."""
    headers = [(b"x-request-id", first.request_id.encode()), (b"x-leadline-idempotent-replay", b"true")]
    if first.content_type == STREAM_TYPE:
        await reply.start_stream(lines_of(headers))
        await reply.send(first.body)
        await reply.end()
        return
    if first.status >= 400:
        headers.append((b"x-should-retry", b"false"))  # under this key nothing else will come
    await reply.whole(first.status, lines_of(headers), first.body)


def _attempted(headers: bytes) -> bool:
    """Whether an upstream was called."""
    return b"x-leadline-attempts: " in headers and b"x-leadline-attempts: 0\r\n" not in headers
