"""Frames of the engine link: four bytes of length, big endian, then one msgpack struct."""

import asyncio
from typing import Final

import msgspec

from local_engine.types import Command, Event

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
_LENGTH_BYTES: Final = 4
_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


class FrameError(Exception):
    """The other side sent something that is no frame of ours; the connection cannot be used any more."""


def encode_frame(message: Command | Event) -> bytes:
    """One frame, ready to write. Raises FrameError when it is larger than the other side would accept."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The body of the next frame; None when the other side closed. Raises FrameError on a frame over the limit."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
