"""From a stream's chunks to one whole completion, and back: what the cache stores and what it replays."""

from typing import Any

import msgspec

from gateway.ledger.settle import Usage, WireUsage
from gateway.upstream.types import Answer, AnswerStream, Event, Pattern, UpstreamError

_encode = msgspec.json.Encoder().encode


class _ChunkChoice(msgspec.Struct):
    index: int = 0
    delta: dict[str, Any] = {}
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    """Of vLLM and the local engine: the stop string that ended it."""
    matched_stop: str | int | msgspec.UnsetType | None = msgspec.UNSET
    """Of SGLang, likewise."""


class _Chunk(msgspec.Struct):
    choices: list[_ChunkChoice] = []
    usage: dict[str, Any] | None = None
    id: str = ""
    created: int = 0
    model: str = ""


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_JOINED = ("content", "reasoning_content", "reasoning", "refusal")
_INPUTS = {"function": "arguments", "custom": "input"}
"""What a tool call of each kind is given, piece by piece."""


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
            elif isinstance(value, list) and isinstance(before := message.get(name, []), list):
                message[name] = [*before, *value]
            else:
                _keep(message, name, value)
        if piece.logprobs and piece.logprobs.get("content"):
            choice["logprobs"] = choice["logprobs"] or {"content": []}
            choice["logprobs"]["content"].extend(piece.logprobs["content"])
        choice["finish_reason"] = piece.finish_reason or choice["finish_reason"]
        if piece.stop_reason is not msgspec.UNSET:
            choice["stop_reason"] = piece.stop_reason
        if piece.matched_stop is not msgspec.UNSET:
            choice["matched_stop"] = piece.matched_stop


class Kept:
    """The chunks of a stream, as few as say the same: of those that differ in a word alone, one with all the words."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._pattern: Pattern | None = None
        self._words: list[bytes] = []
        self.size = 0
        """Bytes."""

    def add(self, event: Event) -> None:
        pattern = event.pattern
        if pattern is None or pattern is not self._pattern:
            self._close()
            self._pattern = pattern
        if pattern is None:
            self._chunks.append(event.data)
            self.size += len(event.data)
        else:
            words = pattern.words(event.data)
            self._words.append(words)
            self.size += len(words)

    def chunks(self) -> list[bytes]:
        self._close()
        return self._chunks

    def _close(self) -> None:
        if self._pattern is not None and self._words:
            self._chunks.append(self._pattern.around(b"".join(self._words)))
            self._words = []


def _merge_tool_calls(calls: list[dict[str, Any]], pieces: list[dict[str, Any]]) -> None:
    for piece in pieces:
        index = piece.get("index", len(calls))
        if not 0 <= index <= len(calls):
            raise TypeError(f"a tool call of index {index}")
        if index == len(calls):
            kind = piece.get("type") or ("custom" if piece.get("custom") else "function")
            calls.append({"id": "", "type": kind})
        call = calls[index]
        for name, value in piece.items():
            if name in _INPUTS and value is not None:
                _merge_input(call.setdefault(name, {"name": "", _INPUTS[name]: ""}), value)
            elif name != "index":
                _keep(call, name, value)


def _merge_input(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if name in ("name", *_INPUTS.values()):
            whole[name] = whole.get(name, "") + (value or "")
        else:
            _keep(whole, name, value)


def _keep(whole: dict[str, Any], name: str, value: Any) -> None:
    """A value that is not told in pieces: once, or again the same."""
    if value is None or value == "":
        return
    if whole.get(name) not in (value, "", None):
        raise TypeError(f"{name} comes in pieces of a kind that this version does not know")
    whole[name] = value


def as_stream(body: bytes) -> list[bytes]:
    """The chunks (JSON, without the terminator) of a stream that gives this completion; the last carries its usage."""
    whole = msgspec.json.decode(body)
    choices, usage = whole.pop("choices"), whole.pop("usage", None)
    frame = {"id": None, "created": None, "model": None, **whole, "object": "chat.completion.chunk"}
    chunks = []
    for number, choice in enumerate(choices):
        index = choice.get("index", number)
        delta = {name: value for name, value in choice["message"].items() if value is not None}
        for place, call in enumerate(delta.get("tool_calls") or ()):
            call.setdefault("index", place)
        piece = {"index": index, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.get("finish_reason") or "stop"}
        last |= {name: value for name, value in choice.items() if name not in ("message", *last)}
        chunks += [_encode({**frame, "choices": [piece]}), _encode({**frame, "choices": [last]})]
    chunks.append(_encode({**frame, "choices": [], "usage": usage}))
    return chunks


async def whole_of(stream: AnswerStream, gathered: Gathered) -> Answer:
    """A stream to its end, as the whole answer that it is; closes it. Raises UpstreamError."""
    state = stream.state
    try:
        async for events in stream:
            for event in events:
                gathered.add(event.data)
        body = gathered.body()
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError) as error:
        words = f"a stream that no answer can be put together from ({type(error).__name__})"
        raise UpstreamError("bad_answer", words, may_be_billed=True) from error
    finally:
        await stream.close()
    return Answer(body, state.usage, state.delivered_bytes, state.plan)


class _UsageOnly(msgspec.Struct):
    usage: WireUsage | None = None


def usage_of(body: bytes) -> Usage | None:
    """The usage that a whole completion reports."""
    usage = msgspec.json.decode(body, type=_UsageOnly).usage
    return usage.split() if usage is not None else None


def replay(body: bytes, *, stream: bool) -> list[bytes] | None:
    """What to give again for a stored completion: its chunks, or nothing more than itself (an empty list).

    None for a completion of a shape that cannot be replayed.
    """
    try:
        usage = usage_of(body)
        chunks = as_stream(body) if stream else []
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None
    return chunks if usage is not None else None


def gather(chunks: list[bytes]) -> bytes | None:
    """The whole completion; None for a stream of a shape that cannot be put together, which is then not cached."""
    whole = Gathered()
    try:
        for chunk in chunks:
            whole.add(chunk)
        return whole.body()
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None
