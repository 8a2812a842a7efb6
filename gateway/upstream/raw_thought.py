"""A thought that goes on at vLLM, as raw text: its chat endpoint cannot be told of one that has only begun.

A template takes the last message for a whole one: Qwen3's puts an empty thought before it, DeepSeek's drops a thought
that is over. So the server is asked for the prompt that it would make of the conversation (`/tokenize`, then
`/detokenize`), the thought is written behind that, and `/v1/completions` goes on from there. What comes back is told as
a chat's chunks are.
"""

from contextlib import suppress
from typing import Any

import msgspec

from gateway.upstream.begun import CLOSE, OPEN, closing
from gateway.upstream.types import ChatCall
from local_engine.types import ThoughtSoFar

_encode = msgspec.json.Encoder().encode
_CHAT_ALONE = frozenset(
    {"messages", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs",
     "chat_template", "include_reasoning", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
)  # fmt: skip
_NO_TEXT_OF = ("documents", "echo")
"""What a prompt that is told, or an answer to raw text, would not have as a chat has it."""
_ODD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError, AttributeError, ValueError)
_NULL, _TRUE, _FALSE = msgspec.Raw(b"null"), msgspec.Raw(b"true"), msgspec.Raw(b"false")


def has_text(call: ChatCall) -> bool:
    """Whether a prompt in text says all that the chat says."""
    return call.text_only and all(call.fields.get(name, _NULL) in (_NULL, _FALSE) for name in _NO_TEXT_OF)


def conversation_body(call: ChatCall, model: str) -> bytes:
    """The body that asks `/tokenize` for the prompt up to where the answer begins."""
    words: dict[str, Any] = {}
    if (effort := call.fields.get("reasoning_effort", _NULL)) != _NULL:  # as the chat endpoint has it
        words = {"reasoning_effort": effort, "enable_thinking": bytes(effort) != b'"none"'}
    given = msgspec.json.decode(call.fields.get("chat_template_kwargs", _NULL), type=dict[str, Any] | None)
    asked = {"model": model, "messages": call.fields["messages"], "chat_template_kwargs": {**words, **(given or {})}}
    asked |= {name: call.fields[name] for name in ("tools", "chat_template") if name in call.fields}
    return _encode(asked)


def read_tokens(body: bytes) -> list[int]:
    """What `/tokenize` answered. Raises msgspec.DecodeError."""
    return msgspec.json.decode(body, type=_Tokens).tokens


def tokens_body(model: str, tokens: list[int]) -> bytes:
    """The body that asks `/detokenize` for the text of tokens."""
    return _encode({"model": model, "tokens": tokens})


def read_text(body: bytes) -> str:
    """What `/detokenize` answered. Raises msgspec.DecodeError."""
    return msgspec.json.decode(body, type=_Text).prompt


def text_body(model: str, prompt: str) -> bytes:
    """The body that asks `/tokenize` for the tokens of a text."""
    return _encode({"model": model, "prompt": prompt, "add_special_tokens": False})


def read_room(body: bytes) -> int:
    """Tokens that fit behind the prompt of which `/tokenize` answered. Raises msgspec.DecodeError."""
    found = msgspec.json.decode(body, type=_Size)
    return max(1, found.max_model_len - found.count)


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Size(msgspec.Struct):
    count: int
    max_model_len: int


class _Text(msgspec.Struct):
    prompt: str


def with_thought(prompt: str, said: ThoughtSoFar, answer: str) -> str:
    """The prompt with what there is of a thought, and of the answer to it; a template may have opened it already."""
    if not prompt.rstrip("\n").endswith(OPEN):
        prompt += f"{OPEN}\n"
    text = said.text.lstrip("\n") if prompt.endswith("\n") else said.text
    return f"{prompt}{text.rstrip()}\n{CLOSE}\n\n{answer}" if said.over else prompt + text


def limit(fields: dict[str, msgspec.Raw]) -> msgspec.Raw | None:
    """The tokens that a chat may write; None: as many as fit."""
    stated = (fields.get(name, _NULL) for name in ("max_completion_tokens", "max_tokens"))
    return next((most for most in stated if most != _NULL), None)


def completion(fields: dict[str, msgspec.Raw], prompt: str, most: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of a chat for `/v1/completions`; `most` tokens, which stop at 16 where nothing is said."""
    raw = {name: value for name, value in fields.items() if name not in _CHAT_ALONE}
    raw |= {"prompt": msgspec.Raw(_encode(prompt)), "add_special_tokens": _FALSE, "max_tokens": most}
    if fields.get("logprobs") == _TRUE:
        raw["logprobs"] = fields.get("top_logprobs", msgspec.Raw(b"0"))
    return raw


class RawThought:
    """Tells the chunks of one raw stream as a chat's: the thought apart from the answer."""

    def __init__(self, *, over: bool) -> None:
        self._over = over
        self._held = ""
        """What may be the beginning of the closing tag."""

    def as_chat(self, data: bytes) -> bytes:
        """A chunk; what is none is left to whoever reads it. Raises nothing."""
        with suppress(*_ODD):
            chunk: dict[str, Any] = msgspec.json.decode(data)
            chunk["choices"] = [self._choice(choice) for choice in chunk["choices"]]
            return _encode(chunk)
        return data

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        thought, answer = self._split(choice.get("text") or "", ends=choice.get("finish_reason") is not None)
        delta = {name: text for name, text in (("reasoning_content", thought), ("content", answer)) if text}
        kept = {name: value for name, value in choice.items() if name != "text"}
        return {**kept, "delta": delta, "logprobs": _listed(choice.get("logprobs"))}

    def _split(self, text: str, *, ends: bool) -> tuple[str, str]:
        if self._over:
            return "", text
        thought, tag, answer = (self._held + text).partition(CLOSE)
        self._held, self._over = "", bool(tag)
        if not (tag or ends):
            sure = len(thought) - closing(thought)
            thought, self._held = thought[:sure], thought[sure:]
        return thought, answer


def _listed(found: Any) -> dict[str, Any] | None:
    """The log-probabilities of a text completion, as a chat lists them; None: there are none that can be read."""
    with suppress(*_ODD):
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        return {
            "content": [
                {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": _ranked(top or {})}
                for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
            ]
        }
    return None


def _ranked(top: dict[str, float]) -> list[dict[str, Any]]:
    ranked = sorted(top.items(), key=lambda one: -one[1])
    return [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in ranked]
