"""What the upstream answers when it behaves: seeded by the question, so that a stream says what a whole answer says."""

import base64
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tests.upstream.oracle import Tokens, prompt_tokens, texts
from tests.upstream.scripted import Script, function_of, script

WORDS = (
    "lead",
    "line",
    "sounds",
    "the",
    "channel",
    "naïve",
    "東京",
    "🙂",
    "fathom",
    "deep",
    "six",
    "by",
    "mark",
    "twain",
)
DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class Piece:
    """One event of a stream, and how much of the answer it carries."""

    data: bytes
    tokens: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    reasoning: list[str]
    content: list[str]
    tool_arguments: list[str]
    finish_reason: str


class Answer(Protocol):
    """What the upstream has to say to one call, and what that comes to."""

    tokens: Tokens
    include_usage: bool

    def whole(self, usage: dict[str, Any] | None) -> dict[str, Any]: ...

    def pieces(self) -> list[Piece]:
        """The events of its stream, in order, without usage and terminator."""
        ...

    def chunk(self, **fields: Any) -> bytes: ...


class ChatAnswer:
    """One chat completion, whole or in pieces."""

    def __init__(self, body: dict[str, Any], seed: int) -> None:
        meta = body.get("metadata") or {}
        rng = random.Random(f"{seed} {body['model']} {json.dumps(body['messages'])}")
        prompt = prompt_tokens(body)
        cached = min(prompt, int(meta["cached"]) if "cached" in meta else rng.choice((0, prompt // 3)))
        written = min(prompt - cached, int(meta["written"]) if "written" in meta else rng.choice((0, prompt // 4)))
        thought = int(meta["reasoning"]) if "reasoning" in meta else rng.choice((0, 0, rng.randint(1, 8)))
        words = int(meta["words"]) if "words" in meta else rng.randint(3, 16)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 30
        use_tool = bool(body.get("tools")) and body.get("tool_choice") != "none"
        self._model = body["model"]
        self._hidden = meta.get("hidden") == "1"
        said = script(body)
        self._tool = said.tool if said else function_of(body["tools"][0]).get("name", "tool") if use_tool else None
        self.include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.choices = [
            _scripted(said, limit) if said else _choice(rng, thought, words, limit, use_tool)
            for _ in range(body.get("n") or 1)
        ]
        self.tokens = Tokens(
            prompt - cached - written,
            cached,
            written,
            sum(len(choice.content) + len(choice.tool_arguments) for choice in self.choices),
            sum(len(choice.reasoning) for choice in self.choices),
        )

    def whole(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        document = {
            "id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": self._model,
            "choices": [self._message(index, choice) for index, choice in enumerate(self.choices)],
            "vendor_field": {"kept": True},
        }  # fmt: skip
        return document if usage is None else {**document, "usage": usage}

    def pieces(self) -> list[Piece]:
        """Choices interleaved word by word."""
        out = [self._piece(index, {"role": "assistant", "content": ""}) for index in range(len(self.choices))]
        lanes = [list(self._deltas(choice)) for choice in self.choices]
        for at in range(max(map(len, lanes), default=0)):
            for index, lane in enumerate(lanes):
                if at < len(lane):
                    delta, text, tokens = lane[at]
                    out.append(self._piece(index, delta, tokens, len(text.encode())))
        for index, choice in enumerate(self.choices):
            out.append(Piece(self.chunk(choices=[_part(index, {}, choice.finish_reason)])))
        return out

    def chunk(self, **fields: Any) -> bytes:
        frame = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": self._model}
        return event({**frame, **fields})

    def _piece(self, index: int, delta: dict[str, Any], tokens: int = 0, text_bytes: int = 0) -> Piece:
        return Piece(self.chunk(choices=[_part(index, delta, None)]), tokens, text_bytes)

    def _deltas(self, choice: Choice) -> list[tuple[dict[str, Any], str, int]]:
        """(delta, its text, its tokens)."""
        deltas: list[tuple[dict[str, Any], str, int]] = []
        if not self._hidden:
            deltas += [({"reasoning_content": text}, text, 1) for text in _spaced(choice.reasoning)]
        deltas += [({"content": text}, text, 1) for text in _spaced(choice.content)]
        for at, text in enumerate(choice.tool_arguments):
            call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
            if at == 0:
                call |= {"id": "call_1", "type": "function"}
                call["function"]["name"] = self._tool
            deltas.append(({"tool_calls": [call]}, text, 1))
        return deltas

    def _message(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(_spaced(choice.content)) or None}
        if choice.reasoning and not self._hidden:
            message["reasoning_content"] = "".join(_spaced(choice.reasoning))
        if choice.tool_arguments:
            function = {"name": self._tool, "arguments": "".join(choice.tool_arguments)}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}


def _choice(rng: random.Random, thought: int, words: int, limit: int, use_tool: bool) -> Choice:
    thought = min(thought, limit)
    cut = words > limit - thought
    words = min(words, limit - thought)
    reasoning = [rng.choice(WORDS) for _ in range(thought)]
    said = [rng.choice(WORDS) for _ in range(words)]
    if use_tool:
        arguments = ['{"text":"', *said[2:], '"}'] if words >= 2 else said
        return Choice(reasoning, [], arguments[:words], "length" if cut else "tool_calls")
    return Choice(reasoning, said, [], "length" if cut else "stop")


def _scripted(said: Script, limit: int) -> Choice:
    words = said.text.split(" ")
    reason = "length" if len(words) > limit else "stop"
    if said.tool is None:
        return Choice([], words[:limit], [], reason)
    return Choice([], [], _spaced(words)[:limit], "length" if len(words) > limit else "tool_calls")


def _spaced(words: list[str]) -> list[str]:
    return [word if at == 0 else " " + word for at, word in enumerate(words)]


def _part(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class TextAnswer:
    """One legacy completion, whole or in pieces."""

    def __init__(self, body: dict[str, Any], seed: int) -> None:
        meta = body.get("metadata") or {}
        rng = random.Random(f"{seed} {body['model']} {body.get('prompt')}")
        words = int(meta["words"]) if "words" in meta else rng.randint(3, 16)
        words = min(words, body.get("max_tokens") or 16)
        count = len(texts(body)) * (body.get("n") or 1)
        self._model = body["model"]
        self.include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._texts = [_spaced([rng.choice(WORDS) for _ in range(words)]) for _ in range(count)]
        self.tokens = Tokens(input=prompt_tokens(body), output=words * count)

    def whole(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        choices = [
            {"index": index, "text": "".join(text), "logprobs": None, "finish_reason": "stop"}
            for index, text in enumerate(self._texts)
        ]
        return {"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": self._model,
                "choices": choices, **({} if usage is None else {"usage": usage})}  # fmt: skip

    def pieces(self) -> list[Piece]:
        out = []
        for index, text in enumerate(self._texts):
            for at, word in enumerate(text):
                reason = "stop" if at + 1 == len(text) else None
                part = {"index": index, "text": word, "logprobs": None, "finish_reason": reason}
                out.append(Piece(self.chunk(choices=[part]), 1, len(word.encode())))
        return out

    def chunk(self, **fields: Any) -> bytes:
        return event({"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": self._model, **fields})


class EmbeddingAnswer:
    """Eight numbers for each input, the same for the same text."""

    include_usage = False

    def __init__(self, body: dict[str, Any], seed: int) -> None:
        self._texts = texts(body)
        self._body, self._seed = body, seed
        self.tokens = Tokens(input=prompt_tokens(body))

    def whole(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector(text)}
            for index, text in enumerate(self._texts)
        ]
        document = {"object": "list", "data": data, "model": self._body["model"]}
        if usage is None:
            return document
        return {**document, "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")}}

    def pieces(self) -> list[Piece]:
        return []

    def chunk(self, **fields: Any) -> bytes:
        return event(fields)

    def _vector(self, text: Any) -> list[float] | str:
        rng = random.Random(f"{self._seed} {text}")
        vector = [round(rng.uniform(-1, 1), 6) for _ in range(self._body.get("dimensions") or 8)]
        if self._body.get("encoding_format") != "base64":
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


ANSWERS: dict[str, Callable[[dict[str, Any], int], Answer]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": TextAnswer,
    "/v1/embeddings": EmbeddingAnswer,
}
