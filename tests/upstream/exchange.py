"""One call on one connection: what a fault can do to it, and the row that says what it did."""

import asyncio
import json
import socket
import struct
from dataclasses import replace
from typing import Any

from tests.upstream.answers import DONE, Answer, Piece
from tests.upstream.oracle import Tokens, nanousd
from tests.upstream.truth import Row, TruthFile

Headers = dict[str, str]


class CallerGone(Exception):
    """The other side has closed the connection."""


class Over(Exception):
    """This side has closed or reset the connection on purpose."""


class Exchange:
    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        truth: TruthFile,
        row: Row,
        body: dict[str, Any],
        answer: Answer,
    ) -> None:
        self.row = row
        self.answer = answer
        self.stream = row.stream
        self.meta: dict[str, str] = body.get("metadata") or {}
        self._reader = reader
        self._writer = writer
        self._truth = truth
        self._chunked = False

    # the books ------------------------------------------------------------------------------------------------------

    def bill(self, tokens: Tokens, *, reported: bool = False) -> None:
        self.row.tokens, self.row.nanousd, self.row.reported = tokens, nanousd(self.row.model, tokens), reported

    def bill_delivered(self) -> None:
        """The prompt, and as much of the answer as has been handed to the network."""
        self.bill(replace(self.answer.tokens, output=self.row.delivered_tokens, reasoning=0))

    def note(self) -> None:
        self._truth.write(self.row)

    # the connection -------------------------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Raises CallerGone."""
        if self._reader.at_eof() or self._writer.is_closing():
            raise CallerGone
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError as error:
            raise CallerGone from error

    async def pause(self, seconds: float) -> None:
        """Raises CallerGone as soon as the caller leaves."""
        try:
            async with asyncio.timeout(seconds):
                await self.hang()
        except TimeoutError:
            return

    async def hang(self) -> None:
        """Wait for the caller to leave. Raises CallerGone."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except ConnectionError as error:
            raise CallerGone from error
        raise CallerGone

    def reset(self) -> None:
        """RST instead of FIN. Raises Over."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        raise Over

    # HTTP -----------------------------------------------------------------------------------------------------------

    async def respond(
        self, status: int, body: bytes, *, headers: Headers | None = None, length: int | None = None
    ) -> None:
        """A whole response; its row is written before its first byte leaves."""
        if 200 <= status < 300:
            self.row.phase = "complete"
        self.note()
        size = len(body) if length is None else length
        await self.send(head(status, {"Content-Length": str(size), **(headers or {})}) + body)

    async def respond_json(self, document: dict[str, Any], *, headers: Headers | None = None) -> None:
        await self.respond(200, json.dumps(document, ensure_ascii=False).encode(), headers=headers)

    async def start_stream(self, headers: Headers | None = None, *, chunked: bool = True) -> None:
        """The head of a stream of events; the row says from here on that the call has begun."""
        self.bill_delivered()
        self.row.phase = "headers"
        self.note()
        self._chunked = chunked
        framing = {"Transfer-Encoding": "chunked"} if chunked else {}
        await self.send(head(200, {"Content-Type": "text/event-stream", **framing, **(headers or {})}))

    async def send_part(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    async def send_piece(self, piece: Piece) -> None:
        await self.send_part(piece.data)
        self.delivered([piece])

    def delivered(self, pieces: list[Piece]) -> None:
        self.row.phase = "body"
        self.row.delivered_tokens += sum(piece.tokens for piece in pieces)
        self.row.delivered_bytes += sum(piece.text_bytes for piece in pieces)

    async def send_pieces(self, pieces: list[Piece]) -> None:
        """At the call's own pace, or all in one write."""
        pace_s = int(self.meta.get("pace_ms", 0)) / 1000
        if pace_s:
            for piece in pieces:
                await self.send_piece(piece)
                await self.pause(pace_s)
        elif pieces:
            await self.send_part(b"".join(piece.data for piece in pieces))
            self.delivered(pieces)

    def usage_event(self, document: dict[str, Any] | None = None) -> bytes:
        """The last chunk, where the caller asked for it."""
        if not self.answer.include_usage:
            return b""
        return self.answer.chunk(choices=[], usage=document or self.answer.tokens.wire())

    async def end_stream(
        self, data: bytes | None = None, *, tokens: Tokens | None = None, reported: bool = True
    ) -> None:
        """Usage and terminator (or `data` in their place). The row is complete before any of it leaves."""
        self.bill(tokens or self.answer.tokens, reported=reported and self.answer.include_usage)
        self.row.phase = "complete"
        self.note()
        await self.send_part(self.usage_event() + DONE if data is None else data)
        if self._chunked:
            await self.send(b"0\r\n\r\n")

    # the proper answer ----------------------------------------------------------------------------------------------

    async def answer_properly(self) -> None:
        if not self.stream:
            await self.pause_first()
            self.bill(self.answer.tokens, reported=True)
            await self.respond_json(self.answer.whole(self.answer.tokens.wire()))
            return
        await self.start_stream()
        await self.send_pieces(self.answer.pieces())
        await self.end_stream()

    async def pause_first(self) -> None:
        """A whole answer takes its time before it comes."""
        pace_s = int(self.meta.get("pace_ms", 0)) / 1000
        if pace_s:
            self.bill_delivered()
            self.note()
            await self.pause(pace_s)


_REASONS = {200: "OK", 302: "Found", 307: "Temporary Redirect", 404: "Not Found", 529: "Overloaded"}


def head(status: int, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
    if "Content-Type" not in headers:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"
