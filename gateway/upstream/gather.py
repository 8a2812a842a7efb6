"""From a stream's chunks to one whole completion, and back: what the cache stores and what it replays."""

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class _ChunkChoice(msgspec.Struct):
    index: int = 0
    delta: dict[str, Any] = {}
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_ChunkChoice] = []
    usage: dict[str, Any] | None = None
    id: str = ""
    created: int = 0
    model: str = ""


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_JOINED = ("content", "reasoning_content", "refusal")


class Gathered:
    """A whole chat completion, put together from the chunks of its stream."""

    def __init__(self, completion_id: str = "", created: int = 0, model: str = "") -> None:
        self._id, self._created, self._model = completion_id, created, model
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    def add(self, data: bytes) -> None:
        chunk = _chunk_decoder.decode(data)
        self._id = self._id or chunk.id
        self._created = self._created or chunk.created
        self._model = self._model or chunk.model
        self._usage = chunk.usage or self._usage
        for piece in chunk.choices:
            choice = self._choices.setdefault(
                piece.index,
                {"index": piece.index, "message": {"role": "assistant", "content": None}, "logprobs": None,
                 "finish_reason": None},
            )  # fmt: skip
            self._merge(choice, piece)

    def body(self) -> bytes:
        return _encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._created,
                "model": self._model,
                "choices": [self._choices[index] for index in sorted(self._choices)],
                "usage": self._usage,
            }
        )

    @staticmethod
    def _merge(choice: dict[str, Any], piece: _ChunkChoice) -> None:
        message = choice["message"]
        for name, value in piece.delta.items():
            if value is None:
                continue
            if name in _JOINED:
                message[name] = (message.get(name) or "") + value
            elif name == "tool_calls":
                _merge_tool_calls(message.setdefault("tool_calls", []), value)
            else:
                message[name] = value
        if piece.logprobs and piece.logprobs.get("content"):
            choice["logprobs"] = choice["logprobs"] or {"content": []}
            choice["logprobs"]["content"].extend(piece.logprobs["content"])
        choice["finish_reason"] = piece.finish_reason or choice["finish_reason"]


def _merge_tool_calls(calls: list[dict[str, Any]], pieces: list[dict[str, Any]]) -> None:
    for piece in pieces:
        index = piece.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["type"] = piece.get("type") or call["type"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def as_stream(body: bytes) -> list[bytes]:
    """The chunks (JSON, without the terminator) of a stream that gives this completion; the last carries its usage."""
    whole = msgspec.json.decode(body)
    frame = {
        "id": whole.get("id"),
        "object": "chat.completion.chunk",
        "created": whole.get("created"),
        "model": whole.get("model"),
    }
    chunks = []
    for choice in whole["choices"]:
        delta = {name: value for name, value in choice["message"].items() if value is not None}
        for index, call in enumerate(delta.get("tool_calls") or ()):
            call.setdefault("index", index)
        piece = {"index": choice["index"], "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}
        last = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        chunks += [_encode({**frame, "choices": [piece]}), _encode({**frame, "choices": [last]})]
    chunks.append(_encode({**frame, "choices": [], "usage": whole.get("usage")}))
    return chunks


def gather(chunks: list[bytes]) -> bytes | None:
    """The whole completion; None for a stream of a shape that cannot be put together, which is then not cached."""
    whole = Gathered()
    try:
        for chunk in chunks:
            whole.add(chunk)
        return whole.body()
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None
