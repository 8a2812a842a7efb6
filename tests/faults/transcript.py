"""What one caller was told: parsed strictly, so that nothing that is no proper answer passes for one."""

import json
from collections.abc import Iterator
from typing import Any

DONE = b"data: [DONE]\n\n"


class Transcript:
    """One answer of the gateway, whole or streamed."""

    def __init__(self, status: int, request_id: str, content_type: str, raw: bytes) -> None:
        self.status = status
        self.request_id = request_id
        self.raw = raw
        self.streamed = content_type.startswith("text/event-stream")
        self.documents: list[Any] = []
        """The answer, or the events of a stream without its terminator."""
        self.unreadable = b""
        """What of it is no JSON."""
        parts = [raw]
        if self.streamed:
            events = [part for part in raw.split(b"\n\n") if part.startswith(b"data: ")]
            parts = [event.replace(b"\ndata: ", b"\n")[6:] for event in events if event != b"data: [DONE]"]
        for part in parts:
            try:
                self.documents.append(json.loads(part))
            except ValueError:
                self.unreadable = part

    @property
    def error(self) -> Any:
        """The error that ends it; None where there is none."""
        return self.documents[-1].get("error") if self.documents else None

    @property
    def served(self) -> bool:
        return self.status == 200 and self.error is None and not self.unreadable

    def deltas(self) -> list[str]:
        """The pieces of text that were delivered: content, reasoning, tool arguments."""
        return [
            text for document in self.documents for choice in document.get("choices", ()) for text in _texts(choice)
        ]

    def problems(self) -> Iterator[str]:
        """What is wrong with it as an answer, whoever is to blame."""
        if self.unreadable:
            yield f"not JSON: {self.unreadable[:80]!r}"
        if self.streamed and self.raw.count(DONE) != (self.error is None):
            yield "a stream ends with [DONE] or an error event, and with one of them"
        if self.streamed and self.error is None and not self.raw.endswith(DONE):
            yield "something follows [DONE]"
        if self.streamed and any("error" in document for document in self.documents[:-1]):
            yield "something follows the error event"
        if self.status != 200 and self.error is None:
            yield f"status {self.status} without an error"
        if self.error is not None:
            shape = {name: type(self.error.get(name)) for name in ("message", "type", "param", "code")}
            if shape["message"] is not str or shape["type"] is not str or not {"param", "code"} <= set(self.error):
                yield f"not an OpenAI error: {self.error}"
            if self.error.get("code") == "internal_error":
                yield f"the gateway broke: {self.error['message']}"
        if self.streamed and self.documents and "error" not in self.documents[0]:
            first = self.documents[0]["choices"][0]["delta"]
            if first.get("role") != "assistant":
                yield f"the first event of the stream is lost: it begins with {first}"


def _texts(choice: dict[str, Any]) -> list[str]:
    part = choice.get("delta") or choice.get("message") or {}
    texts = [part.get("reasoning_content"), part.get("content")]
    texts += [call["function"].get("arguments") for call in part.get("tool_calls") or ()]
    return [text for text in texts if text]
