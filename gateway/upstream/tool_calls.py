"""The tool calls of a stream, numbered as OpenAI numbers them: by arrival, from zero, within each choice.

Providers that translate from another protocol begin at 1, leave the index out, or give two calls one index; clients
that collect arguments by index then merge or lose calls. The id tells calls apart where it is given.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class ToolCallPiece(msgspec.Struct):
    """What a delta says of one call, without its words."""

    index: int | None = None
    id: str | None = None


class ToolCallOrder:
    """Of one choice: which call each piece belongs to."""

    __slots__ = ("_by_id", "_by_index", "_count")

    def __init__(self) -> None:
        self._by_id: dict[str, int] = {}
        self._by_index: dict[int | None, int] = {}
        self._count = 0

    def place(self, piece: ToolCallPiece) -> int:
        """The piece's call: that of its id, else the one that its index last meant, else a new one."""
        at = self._by_id.get(piece.id) if piece.id else self._by_index.get(piece.index)
        if at is None:
            at, self._count = self._count, self._count + 1
        if piece.id:
            self._by_id[piece.id] = at
        self._by_index[piece.index] = at
        return at


def renumbered(data: bytes, indexes: Sequence[tuple[int, Sequence[int]]]) -> bytes:
    """The chunk with these indexes of tool calls: for each choice by its place in the chunk, call by call."""
    chunk: dict[str, Any] = msgspec.json.decode(data)
    for place, calls in indexes:
        for call, index in zip(chunk["choices"][place]["delta"]["tool_calls"], calls, strict=True):
            call["index"] = index
    return _encode(chunk)
