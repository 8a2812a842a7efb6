"""Where one step of reasoning ends and the next begins, token by token. No torch here.

A step ends with a delimiter, a blank line by default (SpecReason and Speculative Thinking, arXiv 2504.07891 and
2504.12329, both stop at "\\n\\n"), with the end of the thinking block, or with the end of the turn.
"""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Final, Protocol

DELIMITER: Final = b"\n\n"


class Boundary(Enum):
    """What a token means for the step that it belongs to."""

    INSIDE = "inside"
    STEP = "step"
    """The step ends with this token."""
    CLOSED = "closed"
    """This token ends the thinking block."""
    TURN = "turn"
    """This token ends the turn."""


class Bytes(Protocol):
    """The bytes of each token, as `Pieces` has them."""

    def __getitem__(self, token: int) -> bytes: ...


class StepSplitter:
    """Follows one text. What is not yet a word (a line break after the opening tag) begins a step and ends none.

    A delimiter may lie across tokens. A token that holds one in its middle ends the step as a whole.
    """

    def __init__(
        self,
        pieces: Bytes | Mapping[int, bytes],
        *,
        close: int | None,
        ends: Collection[int],
        open: int | None = None,
        delimiter: bytes = DELIMITER,
    ) -> None:
        """`close` and `open`: the tokens around the thinking block, None where the model has none; `ends`: the turn."""
        if not delimiter:
            raise ValueError("delimiter must not be empty: name the bytes that end a step, such as b'\\n\\n'")
        self._pieces = pieces
        self._close, self._open, self._ends = close, open, ends
        self._delimiter = delimiter
        self._text = bytearray()

    @property
    def text(self) -> bytes:
        """The step so far."""
        return bytes(self._text)

    def push(self, token: int) -> Boundary:
        """Read one token more. After any boundary the next token begins a step."""
        if token in self._ends or token == self._close:
            self._text.clear()
            return Boundary.CLOSED if token == self._close else Boundary.TURN
        if token == self._open:
            return Boundary.INSIDE
        piece = self._pieces[token]
        looked_at = max(0, len(self._text) - len(self._delimiter) + 1)
        self._text += piece
        if self._delimiter in self._text[looked_at:] and self._text.strip():
            self._text.clear()
            return Boundary.STEP
        return Boundary.INSIDE

    def follow(self, other: "StepSplitter") -> None:
        """Go on from where another one is."""
        self._text[:] = other._text
