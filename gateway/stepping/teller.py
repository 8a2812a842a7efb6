"""One answer of several calls, as the one stream that its caller sees."""

import itertools
import time
from typing import Any

import msgspec

from gateway.ledger.settle import NO_USAGE, Usage
from gateway.upstream.told_usage import told_as
from gateway.upstream.types import Event

_encode = msgspec.json.Encoder().encode
_ids = itertools.count()


class Teller:
    """Chunks under one name, and the usage of what they say: of the prompt, as it was first read, and of the text."""

    def __init__(self, model: str) -> None:
        self._frame: dict[str, Any] = {
            "id": f"chatcmpl-{time.time_ns():x}{next(_ids):x}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self.prompt: Usage | None = None
        """Of the first call that was answered; what it wrote does not count here."""
        self.thought_tokens = 0
        self.answer_tokens = 0
        self.begun = False

    def read(self, usage: Usage | None) -> None:
        if self.prompt is None:
            self.prompt = usage

    def thought(self, text: str) -> Event:
        return self.delta({"reasoning_content": text})

    def delta(self, delta: dict[str, Any]) -> Event:
        if not self.begun:
            self.begun = True
            delta = {"role": "assistant", **delta}
        return self._chunk(delta, None)

    def end(self, reason: str) -> list[Event]:
        """The last two: why it ended, and the usage."""
        usage = {**self._frame, "choices": [], "usage": told_as(self.usage)}
        return [self._chunk({}, reason), Event(_encode(usage), True)]

    @property
    def usage(self) -> Usage:
        """Of the text that its caller has, as one call of one model would have had it."""
        read = self.prompt or NO_USAGE
        return msgspec.structs.replace(read, output=self.answer_tokens, reasoning=self.thought_tokens)

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> Event:
        piece = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return Event(_encode({**self._frame, "choices": [piece]}))
