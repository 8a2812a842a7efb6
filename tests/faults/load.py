"""A lean load generator: raw sockets kept alive, requests built beforehand, answers read and kept."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_COST = re.compile(rb"^: leadline-cost-nanousd (\d+)$", re.MULTILINE)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Told:
    """What the caller was told."""

    status: int
    request_id: str
    cost_nanousd: int | None
    """None where it was told none."""
    body: bytes
    """Of a stream with its framing removed."""


def chat_request(key: str, call: str, body: dict[str, Any]) -> bytes:
    """A call by this name, in the ledger (session) and in the truth file (metadata)."""
    body = {**body, "metadata": {**body.get("metadata", {}), "call": call}}
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\nx-session-id: {call}\r\ncache-control: no-store\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def drive(port: int, requests: Sequence[bytes], *, connections: int = 32) -> list[Told]:
    """All answers, in the order of `requests`."""
    answers: list[Told | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            for number, request in waiting:
                writer.write(request)
                answers[number] = await _read_answer(reader)
        finally:
            writer.close()
            await writer.wait_closed()

    await asyncio.gather(*[connection() for _ in range(connections)])
    assert None not in answers
    return [answer for answer in answers if answer is not None]


async def _read_answer(reader: asyncio.StreamReader) -> Told:
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    if length is not None:
        body = await reader.readexactly(int(length[1]))
        cost = _header(head, b"x-leadline-cost-nanousd")
    else:
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        body = b"".join(parts)
        found = _COST.search(body)
        cost = found[1] if found else None
    request_id = _header(head, b"x-request-id") or b""
    return Told(int(head[9:12]), request_id.decode(), int(cost) if cost else None, body)


def _header(head: bytes, name: bytes) -> bytes | None:
    at = head.lower().find(b"\r\n" + name + b": ")
    if at < 0:
        return None
    start = at + len(name) + 4
    return head[start : head.index(b"\r\n", start)]
