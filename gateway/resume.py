"""Going on with a stream that broke: the words so far as a prefix, the new chunks under the old stream's name.

Only plain text can be continued: one choice, no tools, no format, no log probabilities. A target that takes a prefix
(the local engine always does) writes on from the last word; the caller sees one stream, and its last chunk says so.
"""

from dataclasses import replace
from typing import Any

import msgspec

from gateway.upstream.types import ChatCall, Event

MAX_KEPT_BYTES = 1 << 20
"""A longer answer is not continued."""
_encode = msgspec.json.Encoder().encode


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    choices: list[_Choice] = []


_decoder = msgspec.json.Decoder(_Chunk)


def resumable(call: ChatCall) -> bool:
    return (
        call.endpoint == "chat.completions"
        and call.choices == 1
        and not call.has_tools
        and not call.has_format
        and not call.sampling.logprobs
    )


class Transcript:
    """What a stream has said so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._bytes = 0
        self._id: str | None = None
        self._created: int | None = None
        self.resumed = False

    def note(self, event: Event) -> None:
        try:
            chunk = _decoder.decode(event.data)
        except msgspec.DecodeError:
            return
        self._id, self._created = self._id or chunk.id, self._created or chunk.created
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.content:
                self._texts.append(choice.delta.content)
                self._bytes += len(event.data)

    def continued(self, call: ChatCall) -> ChatCall | None:
        """The call that asks for the rest; None when there is nothing that could be continued."""
        if not self._texts or self._bytes > MAX_KEPT_BYTES:
            return None
        messages: list[Any] = msgspec.json.decode(call.fields["messages"], type=list[msgspec.Raw])
        text = "".join(self._texts)
        messages.append(msgspec.Raw(_encode({"role": "assistant", "content": text, "prefix": True})))
        encoded = _encode(messages)
        fields = {**call.fields, "messages": msgspec.Raw(encoded)}
        return replace(call, fields=fields, body_bytes=call.body_bytes + len(encoded), prefix=text)

    def renamed(self, event: Event) -> Event:
        """A chunk of the continuing stream, under the id of the one that broke."""
        fields = msgspec.json.decode(event.data, type=dict[str, Any])
        fields["id"], fields["created"] = self._id, self._created
        return Event(_encode(fields), event.usage_only)
