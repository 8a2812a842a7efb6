"""Which words of a stream are thought, and which are answer."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from gateway.ledger.settle import Usage
from gateway.upstream.begun import CLOSE, OPEN, closing
from gateway.upstream.types import Event, UpstreamError


@dataclass(frozen=True, slots=True)
class Heard:
    """A piece of the thought or of the answer."""

    kind: Literal["thought", "answer"]
    text: str
    listed: tuple[tuple[str, float], ...] = ()
    """Its tokens and their log-probabilities, where the server was asked for them."""

    @property
    def tokens(self) -> tuple[tuple[str, float], ...]:
        """As listed, if they are its text; else its words. A server that guesses tokens sends several in one piece."""
        if "".join(token for token, _ in self.listed) == self.text:
            return self.listed
        return tuple((word, math.nan) for word in _WORD.findall(self.text))


_WORD = re.compile(r"\n\n|\s?\w+|\s?[^\w\s]|\s")


class Following:
    """Follows one stream. Servers that separate thoughts send them in a field; others between tags, or, going on with
    one, up to the closing tag."""

    def __init__(self, *, thought: bool, over: bool, separated: bool = False) -> None:
        """`thought`: some of it is there already; `over`: all of it; `separated`: thoughts are known to come apart."""
        self.over = over
        self._answering = False
        self._open = thought and not over
        """Within tags."""
        self._separated = separated
        self._held = ""
        self._tokens = {"thought": 0, "answer": 0}
        self.finish = ""
        self.thought_tokens = 0
        self.answer_tokens = 0

    def hear(self, event: Event) -> list[Heard]:
        """Raises UpstreamError for a chunk of a shape that nobody knows."""
        try:
            return self._heard(event)
        except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            words = f"a chunk that no thought can be read from ({type(error).__name__})"
            raise UpstreamError("bad_answer", words, may_be_billed=True) from error

    def _heard(self, event: Event) -> list[Heard]:
        if event.usage_only:
            return []
        chunk: dict[str, Any] = msgspec.json.decode(event.data)
        found: list[Heard] = []
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            content = delta.get("content") or ""
            listed = _listed(choice)
            if thought:
                self._separated = True
                found.append(Heard("thought", thought, listed))
            if content:
                found += self._content(content, listed)
            if choice.get("finish_reason"):
                self.finish = choice["finish_reason"]
                if self._held:
                    found.append(Heard("thought" if self._open else "answer", self._held))
                    self._held = ""
        for heard in found:
            self._tokens[heard.kind] += len(heard.tokens)
        return [heard for heard in map(self._begun, found) if heard.text]

    def _begun(self, heard: Heard) -> Heard:
        """Without the line breaks between a thought and its answer."""
        if heard.kind == "thought" or self._answering:
            return heard
        text = heard.text.lstrip("\n")
        self._answering = bool(text)
        return replace(heard, text=text)

    def counted(self, usage: Usage | None) -> None:
        """Its tokens by kind; where the server does not tell, or not apart, as they were heard."""
        thought, answer = self._tokens["thought"], self._tokens["answer"]
        if usage is None:
            self.thought_tokens, self.answer_tokens = thought, answer
            return
        written = usage.output + usage.reasoning
        share = round(written * thought / ((thought + answer) or 1))
        self.thought_tokens = usage.reasoning or share
        self.answer_tokens = written - self.thought_tokens

    def _content(self, text: str, listed: tuple[tuple[str, float], ...]) -> list[Heard]:
        if self._separated or self.over:
            self.over, self._open = True, False
            return [Heard("answer", text, listed)]
        self._held += text
        if not self._open:  # nothing of it so far: does it begin with the tag?
            if OPEN.startswith(self._held.lstrip()[: len(OPEN)]) and len(self._held.lstrip()) < len(OPEN):
                return []
            if not self._held.lstrip().startswith(OPEN):
                said, self._held, self.over = self._held, "", True
                return [Heard("answer", said, listed)]
            self._held, self._open = self._held.lstrip().removeprefix(OPEN).removeprefix("\n"), True
        before, tag, after = self._held.partition(CLOSE)
        if tag:
            self.over, self._open, self._held = True, False, ""
            parts = [("thought", before), ("answer", after)]
            return [Heard(kind, part, listed) for kind, part in parts if part]  # type: ignore[arg-type]
        sure = len(before) - closing(before)
        said, self._held = before[:sure], before[sure:]
        return [Heard("thought", said, listed)] if said else []


def _listed(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    listed = (choice.get("logprobs") or {}).get("content") or ()
    return tuple((str(one["token"]), float(one["logprob"])) for one in listed)
