"""From tokens to text, a little at a time: whole characters, stop strings, thinking apart from content."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from local_engine.model import LocalModel
from local_engine.pieces import Pieces
from local_engine.tool_calls import ToolCallParser
from local_engine.types import ToolCallDelta


class Detokenizer:
    """Incremental decoding by bytes. What can be no character comes out as U+FFFD, as soon as that is certain."""

    def __init__(self, pieces: Pieces, *, begins: bool = True) -> None:
        """`begins`: no text stands before this one, in which a leading space is the tokenizer's own."""
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = begins and pieces.drops_first_space

    def push(self, token: int) -> str:
        """The text this token completes; empty while a character is unfinished."""
        piece = self._pieces[token]
        if self._at_start and piece:
            self._at_start, piece = False, piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def finish(self) -> None:
        """Forget an unfinished character."""
        self._decoder.reset()


class StopStrings:
    """Ends text before the stop string completed first, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = ""
        """The one that ended the text; empty while none has."""

    def push(self, text: str) -> str:
        """The text that is safe to show."""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start, self.hit = min(found)
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
    tool_calls: tuple[ToolCallDelta, ...] = ()


class TextStream:
    """The answer of one sequence: what is said in the thinking block, what after it, and the tools it calls.

    Stop strings act on what comes after the thinking block, and in it where `stops_thought`. The markers and the line
    breaks after them belong to neither part. `tools` says how the model writes calls; None where the request has none.
    """

    def __init__(
        self,
        model: LocalModel,
        stops: Sequence[str],
        *,
        thinking: bool,
        tools: ToolCallParser | None = None,
        stops_thought: bool = False,
        begins: bool = True,
    ) -> None:
        """`thinking`: it is in the thinking block; `begins`: no text of either part stands before it."""
        self._model = model
        self._detokenizer = Detokenizer(model.pieces, begins=begins)
        self._stops = StopStrings(stops)
        self._tools = tools
        self._stops_thought = stops_thought
        self._after_marker = thinking and begins
        self.left_out = 0
        """Line breaks at the beginning of the last token, after a marker, that belong to no part."""
        self.thinking = thinking

    @property
    def stopped(self) -> bool:
        return bool(self._stops.hit)

    @property
    def stopped_by(self) -> str:
        return self._stops.hit

    @property
    def tool_calls(self) -> int:
        """Calls that were told of so far."""
        return self._tools.calls if self._tools else 0

    def push(self, token: int) -> Piece:
        """The text this token sets free."""
        self.left_out = 0
        if token == self._model.think_token or token == self._model.end_think_token:
            self._detokenizer.finish()
            held = self._part(self._stops.finish())
            self.thinking = token == self._model.think_token
            self._after_marker = True
            return held
        if token in self._model.special_tokens and not (self._tools and token in self._model.tool_tokens):
            return Piece()
        return self._piece(self._detokenizer.push(token))

    def finish(self) -> Piece:
        """What was held back; call when no more tokens will come."""
        self._detokenizer.finish()
        held = self._part(self._stops.finish())
        if self._tools is None:
            return held
        last = self._tools.finish()
        return Piece(held.content + last.content, held.reasoning, (*held.tool_calls, *last.calls))

    def _piece(self, text: str) -> Piece:
        if self.stopped:
            return Piece()
        if self._after_marker:
            rest = text.lstrip("\n")
            self.left_out = len(text) - len(rest)
            text, self._after_marker = rest, not rest
        return self._part(self._stops.push(text) if self._stops_thought or not self.thinking else text)

    def _part(self, shown: str) -> Piece:
        """Text of the part that is being written."""
        if self.thinking:
            return Piece(reasoning=shown)
        if self._tools is None:
            return Piece(shown)
        told = self._tools.push(shown)
        return Piece(told.content, "", told.calls)
