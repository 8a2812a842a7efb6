"""A conversation as the one text that probes read. Light: gateway workers import this."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""One chat message in OpenAI's shape, as decoded JSON."""


def render(conversation: Sequence[Message]) -> str:
    """The whole conversation as one text: what the probe reads.

    A lone message is its text, unmarked (the shape of the training tables); several are joined as `role: text`, since
    "yes, do that" is as hard as what it agrees to. Tool calls appear as `name(arguments)`.
    """
    if len(conversation) == 1:
        return _text(conversation[0])
    return "\n\n".join(f"{message.get('role', 'user')}: {_text(message)}" for message in conversation)


def _text(message: Message) -> str:
    parts = [_content(message.get("content"))]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            parts.append(f"{function.get('name', 'tool')}({function.get('arguments', '')})")
    return "\n".join(part for part in parts if part)


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        return str(content)
    return "\n".join(piece for piece in map(_part, content) if piece)


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return str(part)
    kind = str(part.get("type", "text"))
    if kind.endswith("text") or kind == "refusal":
        return str(part.get("text") or part.get(kind) or "")
    return "[image]" if "image" in kind else f"[{kind}]"
