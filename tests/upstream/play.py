"""How each fault is played, byte by byte. A player returns whether the connection may be used again."""

import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from tests.upstream.answers import DONE, Piece
from tests.upstream.exchange import Exchange, Headers, head

Player = Callable[[Exchange, str], Awaitable[bool]]

BOMB_BYTES = 1 << 30
RESET_AFTER_S = 0.1
"""A reset throws away what the other side has not read yet, so it waits until that is likely read."""
_PAST = "Thu, 01 Jan 2026 00:00:00 GMT"
"""For Retry-After as a date: the upstream has no clock, and a date in the past means at once."""


def _whole(x: Exchange) -> bytes:
    """The proper body, billed whether or not it arrives."""
    x.bill(x.answer.tokens)
    return json.dumps(x.answer.whole(x.answer.tokens.wire()), ensure_ascii=False).encode()


def _head_of(x: Exchange, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    after = int(x.meta.get("after", 3))
    return pieces[:after], pieces[after:]


async def _begin(x: Exchange) -> list[Piece]:
    """Start the stream and send its first events; returns the rest."""
    await x.start_stream()
    first, rest = _head_of(x, x.answer.pieces())
    await x.send_pieces(first)
    x.bill_delivered()
    x.note()
    return rest


def _status(status: int, headers: dict[str, Headers] | None = None, html: bytes | None = None) -> Player:
    """An error status; the variant picks its headers."""

    async def play(x: Exchange, variant: str) -> bool:
        more = (headers or {}).get(variant, {})
        if html is not None:
            await x.respond(status, html, headers={"Content-Type": "text/html", **more})
        else:
            error = {"message": f"fault {status}", "type": "fault", "param": None, "code": f"f{status}"}
            await x.respond(status, json.dumps({"error": error}).encode(), headers=more)
        return True

    return play


async def _silence(x: Exchange, variant: str) -> bool:
    _whole(x) if not x.stream else x.bill_delivered()
    x.note()
    await x.hang()
    return False


async def _redirect(x: Exchange, variant: str) -> bool:
    await x.respond(int(variant or 302), b"", headers={"Location": x.meta["location"]})
    return True


async def _invalid_json(x: Exchange, variant: str) -> bool:
    texts = {"truncated": _whole(x)[:-9], "empty": b"", "array": b"[1]", "error": b'{"error":{"message":"overloaded"}}',
             "utf8": _whole(x).replace(b'"assistant"', b'"assist\xffant"')}  # fmt: skip
    if not x.stream:
        await x.respond(200, texts[variant])
    elif variant == "empty":
        await x.start_stream()
        await x.send(b"0\r\n\r\n")
    else:
        await x.start_stream()
        await x.send_part(b"data: " + texts[variant] + b"\n\n" + DONE)
        await x.send(b"0\r\n\r\n")
    return True


async def _content_type(x: Exchange, variant: str) -> bool:
    """`text`: the right body under a wrong name. `swapped`: events for a whole answer, a whole answer for events."""
    if x.stream == (variant == "swapped"):
        body = _whole(x)
        x.row.reported = variant == "text"
        await x.respond(200, body, headers={"Content-Type": "text/html" if variant == "text" else "application/json"})
        return True
    await x.start_stream({"Content-Type": "text/html" if variant == "text" else "text/event-stream"})
    await x.send_pieces(x.answer.pieces())
    await x.end_stream(reported=False)  # no gateway is bound to read events under another name
    return True


async def _content_length(x: Exchange, variant: str) -> bool:
    """`long`: more is declared than comes. `short`: what comes after the declared length looks like a next answer."""
    if not x.stream:
        body = _whole(x)
        await x.respond(200, body, length=len(body) + 100 if variant == "long" else len(body) // 2)
        return variant == "short"
    pieces = x.answer.pieces()
    first, _ = _head_of(x, pieces)
    sent = b"".join(piece.data for piece in first)
    if variant == "long":
        await x.start_stream({"Content-Length": str(1 << 20)}, chunked=False)
        await x.send_pieces(pieces)
        await x.end_stream()
        return False
    await x.start_stream({"Content-Length": str(len(sent) + 10)}, chunked=False)
    x.delivered(first)
    x.bill_delivered()
    x.note()
    await x.send(b"".join(piece.data for piece in pieces) + x.usage_event() + DONE)
    return True


async def _truncated_chunks(x: Exchange, variant: str) -> bool:
    if x.stream and variant == "middle":
        await _begin(x)
    elif x.stream:
        await x.start_stream()
    else:
        body = _whole(x)
        x.note()
        half = body[: len(body) // 2]
        part = b"%x\r\n%s\r\n" % (len(half), half) if variant == "middle" else b""
        await x.send(head(200, {"Transfer-Encoding": "chunked"}) + part)
    return False


async def _reset_before_headers(x: Exchange, variant: str) -> bool:
    _whole(x) if not x.stream else x.bill_delivered()
    x.note()
    x.reset()
    return False


async def _reset_inside_headers(x: Exchange, variant: str) -> bool:
    _whole(x) if not x.stream else x.bill_delivered()
    x.note()
    await x.send(b"HTTP/1.1 200 OK\r\nContent-Type: applica")
    await x.pause(RESET_AFTER_S)
    x.reset()
    return False


async def _half(x: Exchange) -> None:
    body = _whole(x)
    x.note()
    await x.send(head(200, {"Content-Length": str(len(body))}) + body[: len(body) // 2])


async def _reset_after_events(x: Exchange, variant: str) -> bool:
    await (_begin(x) if x.stream else _half(x))
    await x.pause(RESET_AFTER_S)
    x.reset()
    return False


async def _stall(x: Exchange, variant: str) -> bool:
    """`events`: after some of them. `headers`: before any."""
    if not x.stream:
        await _half(x)
    elif variant == "events":
        await _begin(x)
    else:
        await x.start_stream()
    await x.hang()
    return False


async def _drip(x: Exchange, variant: str) -> bool:
    """`start`: byte by byte from the first. `tail`: after some events."""
    pace_s = int(x.meta.get("pace_ms", 1000)) / 1000
    if not x.stream:
        body = _whole(x)
        x.note()
        await x.send(head(200, {"Content-Length": str(len(body))}))
        for at in range(len(body)):
            await x.send(body[at : at + 1])
            await x.pause(pace_s)
        return True
    pieces = x.answer.pieces()
    first, rest = _head_of(x, pieces) if variant == "tail" else ([], pieces)
    await x.start_stream()
    for piece in first:
        await x.send_piece(piece)
    x.bill_delivered()
    x.note()  # a caller that gives up is heard of later
    for piece in rest:
        for at in range(len(piece.data)):
            await x.send_part(piece.data[at : at + 1])
            await x.pause(pace_s)
        x.delivered([piece])
    await x.end_stream()
    return True


def _multi_line(data: bytes) -> bytes:
    return data.replace(b"data: {", b"data: {\ndata: ")


def _with_comments(data: bytes) -> bytes:
    return b": ping\n\n" + data.replace(b"data: ", b": note\nevent: message\nid: 7\nretry: 10\ndata: ")


_SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "no-blank-line": lambda data: data.replace(b"\n\n", b"\n"),
    "cr": lambda data: data.replace(b"\n", b"\r"),
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "bom": lambda data: b"\xef\xbb\xbf" + data,
    "comments": _with_comments,
    "multi-line": _multi_line,
}
_HUGE_WORD = "x" * (8 << 20)


async def _malformed_events(x: Exchange, variant: str) -> bool:
    pieces = x.answer.pieces()
    first, rest = _head_of(x, pieces)
    await x.start_stream()
    if variant in _SPELLINGS:
        x.delivered(pieces)
        events = b"".join(piece.data for piece in pieces) + x.usage_event() + DONE
        await x.end_stream(_SPELLINGS[variant](events), reported=variant != "no-blank-line")
    elif variant == "utf8-invalid":
        await x.send_pieces(first)
        part = {"index": 0, "delta": {"content": "??"}, "finish_reason": None}
        x.bill_delivered()
        x.note()
        await x.send_part(x.answer.chunk(choices=[part]).replace(b"??", b"\xff\xfe"))
        await x.hang()
    elif variant == "utf8-split":
        pieces = [*first, _word(x, "東京"), *rest]
        events = b"".join(piece.data for piece in pieces)
        for at in range(0, len(events), 7):  # 7 bytes never end where a three-byte character does for long
            await x.send_part(events[at : at + 7])
        x.delivered(pieces)
        await _end_with_a_word_more(x)
    else:
        await x.send_pieces([*first, _word(x, _HUGE_WORD), *rest])
        await _end_with_a_word_more(x)
    return True


def _word(x: Exchange, text: str) -> Piece:
    part = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return Piece(x.answer.chunk(choices=[part]), 1, len(text.encode()))


async def _end_with_a_word_more(x: Exchange) -> None:
    x.answer.tokens = replace(x.answer.tokens, output=x.answer.tokens.output + 1)
    await x.end_stream()


async def _done(x: Exchange, variant: str) -> bool:
    """`missing`: all but [DONE]. `unfinished`: no finish reason either. `early`, `followed`: it is not the end."""
    if variant == "unfinished":
        await _begin(x)
        await x.send(b"0\r\n\r\n")
        return True
    pieces = x.answer.pieces()
    first, rest = _head_of(x, pieces)
    await x.start_stream()
    if variant == "early":
        await x.send_pieces(first)
        x.delivered(rest)
        await x.end_stream(DONE + b"".join(piece.data for piece in rest) + x.usage_event() + DONE, reported=False)
        return True
    await x.send_pieces(pieces)
    more = DONE + _word(x, "afterwards").data + DONE if variant == "followed" else b""
    await x.end_stream(x.usage_event() + more)
    return True


def _usage(x: Exchange, variant: str) -> dict[str, Any] | None:
    tokens = x.answer.tokens
    if variant == "missing":
        return None
    if variant == "zero":
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    if variant == "negative":
        return {"prompt_tokens": -tokens.prompt, "completion_tokens": -tokens.completion, "total_tokens": -1}
    if variant == "negative-output":
        return {"prompt_tokens": tokens.prompt, "completion_tokens": -tokens.completion, "total_tokens": 1}
    if variant == "inconsistent":
        # Parts larger than their whole: billed as the whole, all of it in that part.
        x.answer.tokens = replace(
            tokens, input=0, cache_write=0, cached_input=tokens.prompt, output=0, reasoning=tokens.completion
        )
        return {
            "prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": tokens.prompt + 50},
            "completion_tokens_details": {"reasoning_tokens": tokens.completion + 50},
        }  # fmt: skip
    return tokens.wire()


_BELIEVED = ("twice", "inconsistent", "cumulative")


async def _odd_usage(x: Exchange, variant: str) -> bool:
    usage = _usage(x, variant)
    if not x.stream:
        text = json.dumps(x.answer.whole(usage), ensure_ascii=False)
        if variant == "twice":
            text = f'{{"usage":{json.dumps(usage)},{text[1:]}'
        x.bill(x.answer.tokens, reported=variant in _BELIEVED)
        await x.respond(200, text.encode())
        return True
    await x.start_stream()
    if variant.startswith("cumulative"):
        return await _cumulative_usage(x, cut=variant == "cumulative-cut")
    await x.send_pieces(x.answer.pieces())
    event = b"" if usage is None else x.usage_event(usage)
    await x.end_stream(event * (2 if variant == "twice" else 1) + DONE, reported=variant in _BELIEVED)
    return True


async def _cumulative_usage(x: Exchange, *, cut: bool) -> bool:
    """Each chunk carries the count so far, and no last chunk of its own."""
    pieces = x.answer.pieces()
    events = []
    for piece in pieces:
        x.delivered([piece])
        total = x.answer.tokens.wire()
        so_far = {**total, "completion_tokens": x.row.delivered_tokens, "completion_tokens_details": None}
        usage = total if piece is pieces[-1] else so_far
        events.append(piece.data[:-3] + b',"usage":' + json.dumps(usage).encode() + b"}\n\n")
    if cut:
        kept = int(x.meta.get("after", 3))
        x.row.delivered_tokens = x.row.delivered_bytes = 0
        x.delivered(pieces[:kept])
        x.bill_delivered()
        x.note()
        await x.send_part(b"".join(events[:kept]))
        return False
    await x.end_stream(b"".join(events) + DONE)
    return True


def _tool_call(call_id: str, arguments: str) -> dict[str, Any]:
    function = {"name": "sound", "arguments": arguments, "vendor": [1]}
    return {"index": 0, "id": call_id, "type": "function", "function": function, "x_signature": "s"}


async def _odd_fields(x: Exchange, variant: str) -> bool:
    """Two tool calls under one index; fields that nobody knows at every depth."""
    calls = [_tool_call("call_a", '{"depth":1}'), _tool_call("call_b", '{"depth":2}')]
    x.answer.tokens = replace(x.answer.tokens, output=x.answer.tokens.output + 2)
    if not x.stream:
        document = x.answer.whole(x.answer.tokens.wire())
        document["choices"][0]["message"] |= {"tool_calls": calls, "x_unknown": {"deep": [None]}}
        x.bill(x.answer.tokens, reported=True)
        await x.respond_json(document)
        return True
    await x.start_stream()
    pieces = x.answer.pieces()
    odd = []
    for call in calls:
        part = {
            "index": 0,
            "delta": {"tool_calls": [call], "x_unknown": {"deep": [None]}},
            "x": 1,
            "finish_reason": None,
        }
        text = call["function"]["arguments"]
        odd.append(Piece(x.answer.chunk(choices=[part], x_vendor={"a": 1}), 1, len(text)))
    await x.send_pieces([pieces[0], *odd, *pieces[1:]])
    await x.end_stream()
    return True


async def _gzip_bomb(x: Exchange, variant: str) -> bool:
    """About a megabyte that unpacks to a gigabyte of spaces before a proper answer."""
    body = _whole(x)
    spaces = _gzip(b" " * (1 << 20))
    bomb = spaces * (BOMB_BYTES >> 20) + _gzip(body)
    kind = "text/event-stream" if x.stream else "application/json"
    x.bill_delivered() if x.stream else x.bill(x.answer.tokens)
    await x.respond(200, bomb, headers={"Content-Encoding": "gzip", "Content-Type": kind})
    return True


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


PLAYERS: dict[str, Player] = {
    "F05": _silence,
    "F06": _status(408),
    "F07": _status(409),
    "F08": _status(
        429,
        {"seconds": {"Retry-After": "1"}, "date": {"Retry-After": _PAST}, "milliseconds": {"retry-after-ms": "20"}},
    ),
    "F09": _status(429),
    "F10": _status(500),
    "F11": _status(502, html=b"<html><body><h1>502 Bad Gateway</h1></body></html>"),
    "F12": _status(503),
    "F13": _status(529),
    "F14": _redirect,
    "F15": _invalid_json,
    "F16": _content_type,
    "F17": _content_length,
    "F18": _truncated_chunks,
    "F19": _reset_before_headers,
    "F20": _reset_inside_headers,
    "F21": _reset_after_events,
    "F22": _stall,
    "F23": _drip,
    "F24": _malformed_events,
    "F25": _done,
    "F26": _odd_usage,
    "F27": _odd_fields,
    "F28": _gzip_bomb,
}
"""F01 to F04 never reach an upstream: the test's policy plays them with its providers' addresses."""
