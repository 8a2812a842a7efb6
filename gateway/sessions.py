"""What is remembered of conversations that routes with `affinity` answer: who answered last, and what is still cached.

A conversation is known by its session header or, without one, by its system prompt and first words, always within one
tenant. The table is bounded, and forgets the conversation that was quiet for longest; with Redis it is shared between
workers (`gateway.shared_sessions`). Nobody's words are in it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from gateway.upstream.types import ChatCall
from routers.types import Decision

REMEMBERED = 20_000
KEPT_MS = 86_400_000
"""Longer than any provider keeps a prefix."""
LEAST_CACHED = 1024
"""Providers keep prefixes from so many tokens on (OpenAI, Anthropic)."""
BOUND = (b'"thinking_blocks"', b'"reasoning_details"', b'"encrypted_content"', b'"signature"', b'"thought_signature"')
"""Marks of blocks that only the provider which made them can read again."""
_BOUND_FIELDS = frozenset({"thinking_blocks", "reasoning_details", "reasoning_items", "encrypted_content"})
_BOUND_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """What a model read and wrote of a conversation when it answered last."""

    tokens: int
    at_ms: int


class Conversation(msgspec.Struct, frozen=True):
    model: str
    """Who answered last."""
    provider: str
    prefixes: dict[str, Prefix]
    """By model."""
    p_success: dict[str, float]
    """Of each candidate, as the last decision had it."""

    def cached_tokens(self, now_ms: int, ttl_ms: int) -> dict[str, int]:
        """Of each model whose provider still holds the conversation: how much of it."""
        return {
            model: prefix.tokens
            for model, prefix in self.prefixes.items()
            if prefix.tokens >= LEAST_CACHED and now_ms - prefix.at_ms <= ttl_ms
        }


class Store(Protocol):
    async def get(self, key: bytes) -> Conversation | None: ...

    async def put(self, key: bytes, conversation: Conversation) -> None: ...


class MemorySessions:
    """Of one worker."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._known: OrderedDict[bytes, Conversation] = OrderedDict()

    async def get(self, key: bytes) -> Conversation | None:
        return self._known.get(key)

    async def put(self, key: bytes, conversation: Conversation) -> None:
        self._known[key] = conversation
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._known)


_encode = msgspec.json.Encoder().encode


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"null")


_messages = msgspec.json.Decoder(list[_Message]).decode


def conversation_key(secret: bytes, tenant: str, call: ChatCall) -> bytes | None:
    """The key of the conversation that a call goes on with; None: it is none, or cannot be told."""
    if call.endpoint != "chat.completions":
        return None
    session = call.headers.session
    if session is not None:
        parts = [b"session", session.encode()]
    else:
        try:
            messages = _messages(call.fields["messages"])
        except (msgspec.DecodeError, KeyError):
            return None
        first = next((message for message in messages if message.role == "user"), None)
        if first is None:
            return None
        system = [bytes(message.content) for message in messages if message.role in ("system", "developer")][:1]
        parts = [b"words", *system, bytes(first.content)]
    digest = hashlib.blake2b(key=secret[:64], digest_size=16)
    for part in (tenant.encode(), *parts):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def after(
    before: Conversation | None, decision: Decision, model: str, provider: str, tokens: int, now_ms: int
) -> Conversation:
    """What is known once `model` has answered, with `tokens` in the prompt and the answer together."""
    kept: Mapping[str, Prefix] = before.prefixes if before is not None else {}
    alive = {name: prefix for name, prefix in kept.items() if now_ms - prefix.at_ms <= KEPT_MS}
    return Conversation(
        model,
        provider,
        {**alive, model: Prefix(tokens, now_ms)},
        {candidate.model: candidate.p_success for candidate in decision.candidates if candidate.p_success is not None},
    )


def is_bound(call: ChatCall) -> bool:
    """Whether the conversation may hold blocks that only the provider which made them can read again."""
    messages = bytes(call.fields.get("messages", b""))
    return any(mark in messages for mark in BOUND)


def unbound(call: ChatCall) -> ChatCall:
    """The call without such blocks: what was thought stays with its provider, what was said goes on."""
    messages: list[Any] = msgspec.json.decode(call.fields["messages"])
    for message in messages:
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        for name in _BOUND_FIELDS & message.keys():
            del message[name]
        content = message.get("content")
        if isinstance(content, list):
            said = [part for part in content if not (isinstance(part, dict) and part.get("type") in _BOUND_PARTS)]
            message["content"] = said or None
        for tool_call in message.get("tool_calls") or ():
            if isinstance(tool_call, dict):
                tool_call.pop("thought_signature", None)
    return msgspec.structs.replace(call, fields={**call.fields, "messages": msgspec.Raw(_encode(messages))})
