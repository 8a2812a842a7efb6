"""A TCP server that plays bytes: what no well-behaved HTTP library would send."""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Play = bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class RawServer:
    """Answers each request by the next of `plays` (the last one again and again), then closes after `close`."""

    plays: list[Play]
    port: int = 0
    connections: int = 0
    left: int = 0
    """Connections that the client has closed."""
    requests: list[bytes] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, RuntimeError):  # RuntimeError: uvloop's word for a closed connection
            while head := await self._head(reader):
                length = re.search(rb"Content-Length: (\d+)", head)
                play = self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]
                if isinstance(play, bytes):
                    body = await reader.readexactly(int(length[1]) if length else 0)
                    self.requests.append(head + body)
                    writer.write(play)
                else:
                    self.requests.append(head)
                    await play(reader, writer)
        self.left += 1
        writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""


@contextlib.asynccontextmanager
async def raw_server(*plays: Play, tls: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    played = RawServer(list(plays))
    running: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(played.serve(reader, writer))
        running.add(task)
        task.add_done_callback(running.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
    played.port = server.sockets[0].getsockname()[1]
    try:
        yield played
    finally:
        server.close()
        for task in tuple(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for writer in played.writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


def then_close(data: bytes) -> Play:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return play


def then_reset(data: bytes) -> Play:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await asyncio.sleep(0.05)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    return play


def in_pieces(*pieces: bytes, pause_s: float = 0.002) -> Play:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return play
