"""Going on with a stream that broke: the words so far as a prefix, the new chunks under the old stream's name.

Only plain text can be continued: one choice, no tools, no format, no log probabilities. A target that takes a prefix
(the local engine always does) writes on from the last word; the caller sees one stream, and its last chunk says so.
"""

from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.upstream.begun import read_begun
from gateway.upstream.types import ChatCall, Event

MAX_KEPT_BYTES = 1 << 20
"""A longer answer is not continued."""
_CAPS = ("max_tokens", "max_completion_tokens")
_encode = msgspec.json.Encoder().encode


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    choices: list[_Choice] | None = None


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
        self._all_read = True
        """All that was said is in the texts."""
        self._bytes = 0
        self._deltas = 0
        self._id: str | None = None
        self._created: int | None = None
        self.resumed = False

    def note(self, event: Event) -> None:
        try:
            chunk = _decoder.decode(event.data)
        except msgspec.DecodeError:
            self._all_read = False
            return
        self._id, self._created = self._id or chunk.id, self._created or chunk.created
        for choice in chunk.choices or ():
            delta = choice.delta
            if delta is None:
                continue
            if delta.content or delta.reasoning_content or delta.reasoning:
                self._deltas += 1
            if delta.content and not isinstance(delta.content, str):
                self._all_read = False
            elif delta.content:
                self._texts.append(delta.content)
                self._bytes += len(event.data)

    def continued(self, call: ChatCall) -> ChatCall | None:
        """The call that asks for the rest; None when there is nothing that could be continued."""
        if not self._texts or not self._all_read or self._bytes > MAX_KEPT_BYTES:
            return None
        try:
            call = read_begun(call)
        except InvalidRequest:  # whoever answered took it otherwise
            return None
        text = call.prefix + "".join(self._texts)
        fields, sampling = dict(call.fields), call.sampling
        if sampling.max_tokens is not None:
            # What has been said counts; a delta is at least one token.
            left = max(1, sampling.max_tokens - self._deltas)
            sampling = msgspec.structs.replace(sampling, max_tokens=left)
            fields.update({name: msgspec.Raw(b"%d" % left) for name in _CAPS if name in fields})
        more = len(_encode(text))
        return msgspec.structs.replace(
            call, fields=fields, body_bytes=call.body_bytes + more, prefix=text, thought=None, sampling=sampling
        )

    def renamed(self, event: Event) -> Event:
        """A chunk of the continuing stream, under the id of the one that broke. Its role has been told already."""
        fields = msgspec.json.decode(event.data, type=dict[str, Any])
        if self._id is not None:
            fields["id"], fields["created"] = self._id, self._created
        for choice in fields.get("choices") or ():
            if isinstance(choice.get("delta"), dict):
                choice["delta"].pop("role", None)
        return Event(_encode(fields), event.usage_only)
