"""Speculative Thinking: words of doubt hand the thought over to the larger model for a while.

Yang et al. 2025, arXiv 2504.12329: "reasoning-supportive tokens such as 'wait' frequently appear after structural
delimiters like '\\n\\n', serving as signals for reflection or continuation", and there the larger model takes over. As
in their code: after a delimiter the small model drafts twenty tokens; if affirming and doubting words in them do not
balance, the large model writes twenty tokens in their place, and 125 if they speak of verifying. After fifteen doubts
in all it writes 125, then 25 more each time, up to 200, and the next such time comes 5 doubts later, up to 30. Whole
words count here, where theirs match "another" too; their sentence that announces the check is left out. Nothing is
verified.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from local_engine.reason.method import KEEP, NO_FLOOR, WRITE, Do, Move, Opinion
from local_engine.reason.steps import Boundary

LOOK: Final = 20
VERIFY_TOKENS: Final = 125
_AFFIRM: Final = re.compile(r"\b(yeah|yes|final answer|confident)\b", re.IGNORECASE)
_DOUBT: Final = re.compile(r"\b(wait|alternatively|hold on|another)\b", re.IGNORECASE)
_VERIFY: Final = re.compile(r"\b(verify|think again|recap|check)\b", re.IGNORECASE)


@dataclass(slots=True)
class SpeculativeThinking:
    look: int = LOOK
    """Tokens after a delimiter that are read for words of doubt, and that the large model writes in their place."""
    floor: float = NO_FLOOR
    answers: bool = False
    _looked: list[bytes] | None = field(default_factory=list)
    """The tokens after a delimiter; None past the first ones."""
    _left: int = 0
    """Tokens that the large model is still to write."""
    _doubts: int = 0
    _patience: int = 15
    _extra: int = VERIFY_TOKENS

    def drafted(self, said: Opinion, text: bytes, boundary: Boundary) -> Move:
        if boundary in (Boundary.CLOSED, Boundary.TURN):
            return Move(Do.HAND_OVER, take_back=boundary is Boundary.TURN)
        if self._looked is None:
            if boundary is Boundary.STEP:
                self._looked = []
            return KEEP
        self._looked.append(text)
        if len(self._looked) < self.look and boundary is Boundary.INSIDE:
            return WRITE
        count, words = len(self._looked), b"".join(self._looked).decode(errors="replace")
        self._looked = [] if boundary is Boundary.STEP else None
        self._left = self.handed_over(words)
        return Move(Do.HAND_OVER, take_back=count) if self._left else KEEP

    def accepts(self, thought: Sequence[Opinion], offered: int) -> bool:
        return True

    def rated(self, rating: float) -> bool:
        return True

    def written(self, said: Opinion, text: bytes, boundary: Boundary) -> bool:
        self._left -= 1
        if boundary is Boundary.CLOSED or self._left > 0:
            return False
        self._looked = [] if boundary is Boundary.STEP else None
        return True

    def handed_over(self, words: str) -> int:
        """How many tokens the large model writes in place of these words."""
        doubts = len(_DOUBT.findall(words))
        verifying = bool(_VERIFY.search(words))
        self._doubts += doubts
        if self._doubts >= self._patience:
            extra, self._doubts = self._extra, 0
            self._patience, self._extra = min(30, self._patience + 5), min(200, self._extra + 25)
            return extra
        if verifying:
            return VERIFY_TOKENS
        return self.look if len(_AFFIRM.findall(words)) != doubts else 0
