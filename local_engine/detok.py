"""From tokens to text, a little at a time: whole characters, stop strings, thinking apart from content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from local_engine.model import LocalModel

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers print for bytes that are no whole character (yet)


class Detokenizer:
    """Incremental decoding. A token's text may depend on the token before it, so a short window is decoded again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """The text this token completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._unsaid()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._told = self._window[self._told :], len(self._window) - self._told
        return text

    def finish(self) -> str:
        """What is left, without an unfinished character."""
        text = self._unsaid().rstrip(_REPLACEMENT)
        self._window, self._told = [], 0
        return text

    def _unsaid(self) -> str:
        before = self._decode(self._window[: self._told])
        return self._decode(self._window)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Ends text before the stop string completed first, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is safe to show."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            _, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back; call when no more text will come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    content: str = ""
    reasoning: str = ""


class TextStream:
    """The answer of one sequence: what is said in the thinking block and what is said after it.

    Stop strings act on the content only. The markers and the line breaks after them belong to neither part.
    """

    def __init__(self, model: LocalModel, stops: Sequence[str], *, thinking: bool) -> None:
        self._model = model
        self._detokenizer = Detokenizer(model.tokenizer)
        self._stops = StopStrings(stops)
        self._after_marker = thinking
        self.thinking = thinking

    @property
    def stopped(self) -> bool:
        return self._stops.hit

    def push(self, token: int) -> Piece:
        """The text this token sets free."""
        if token == self._model.think_token or token == self._model.end_think_token:
            piece = self._piece(self._detokenizer.finish())
            self.thinking = token == self._model.think_token
            self._after_marker = True
            return piece
        if token in self._model.special_tokens:
            return Piece()
        return self._piece(self._detokenizer.push(token))

    def finish(self) -> Piece:
        """What was held back; call when no more tokens will come."""
        piece = self._piece(self._detokenizer.finish())
        return piece if self.stopped else Piece(piece.content + self._stops.finish(), piece.reasoning)

    def _piece(self, text: str) -> Piece:
        if self.stopped:
            return Piece()
        if self._after_marker:
            text = text.lstrip("\n")
            self._after_marker = not text
        return Piece(reasoning=text) if self.thinking else Piece(content=self._stops.push(text))
