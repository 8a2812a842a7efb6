"""JSON can write half a surrogate pair (`"\\ud800"`), which no text can hold: where one stands in a body."""

import json
import re
from typing import Final

import msgspec

from gateway.errors import InvalidRequest

_HALF = re.compile("[\ud800-\udfff]")
_WRITTEN = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Escaped, or in the UTF-8 that it would have, which Python's decoder of JSON takes."""
_PLACED_BYTES: Final = 64 << 10
"""In a longer body it is not told where: paths to all that stands before it are a hundred times the body."""
_PATH: Final = 200
_read_unbuilt = msgspec.json.Decoder(msgspec.Raw).decode


def half_character_in(body: bytes) -> InvalidRequest | None:
    """The refusal of a body that holds half a pair, by its first place; None: it does not, or is no JSON at all."""
    if not _WRITTEN.search(body):
        return None
    if len(body) > _PLACED_BYTES:
        return _half_in_much(body)
    try:
        waiting: list[tuple[str, object]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return None
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            if found := _HALF.search(value):
                return InvalidRequest(
                    f"{path or 'body'}: {ascii(found[0])[1:-1]} at character {found.start()} is half of a surrogate "
                    "pair, which is no character; send both halves, or leave it out.",
                    param=path or None,
                )
        elif isinstance(value, list):
            waiting += [(f"{path}[{at}]"[:_PATH], part) for at, part in reversed([*enumerate(value)])]
        elif isinstance(value, dict):
            for name, part in reversed(value.items()):
                inner = f"{path}.{ascii(name)[1:-1]}".lstrip(".")[:_PATH]
                waiting += [(inner, part), (inner, name)]
    return None


def _half_in_much(body: bytes) -> InvalidRequest | None:
    try:
        if not body.isascii():
            body.decode()
        _read_unbuilt(body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        return InvalidRequest(
            f"The body is not valid JSON: {error}. It holds half of a surrogate pair, which is no character, or is "
            "torn; send both halves, or leave it out."
        )
    return None
