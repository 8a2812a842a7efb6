"""Words with which a model turns back on its own thought ("Wait", "Hmm", "Alternatively"), found as tokens come.

After LYNX (Akgül et al. 2025, arXiv 2512.05325): "naturally occurring reasoning cues (e.g. 'hmm', 'wait') during
generation" are where a model may be asked whether it is done. Theirs match any substring, so that "waiting" is a cue;
ours match whole words, for which the character after the word has to be known: a cue is found one token late.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CUES: Final = ("wait", "hmm", "alternatively")


@dataclass(frozen=True, slots=True)
class Cue:
    """A cue word, by the tokens it stands in, counted from 0."""

    word: str
    first: int
    """The token in which it begins; a thought that ends here is cut before this token."""
    last: int
    """The token in which it ends."""


class CueFinder:
    """Takes the text of one token after the other."""

    def __init__(self, words: Sequence[str] = CUES) -> None:
        """Raises ValueError for a word that is empty or does not begin and end with a letter or digit."""
        if not words or not all(re.fullmatch(r"\w(.*\w)?", word) for word in words):
            raise ValueError(f"cues must be words or phrases that begin and end with a letter, not {list(words)}")
        self._words = tuple(word.lower() for word in words)
        self._longest = max(map(len, self._words))
        longest_first = sorted(self._words, key=len, reverse=True)
        self._whole = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?=\W)", re.IGNORECASE)
        self._tokens = 0
        self._text = " "  # a thought begins at the beginning of a word
        self._begins: list[tuple[int, int]] = []
        """(where in the text it begins, token) of those tokens that are still in the text."""

    @property
    def pending(self) -> int:
        """The first token that may turn out to be part of a cue; the number of all tokens so far if none may."""
        lowered = self._text.lower()
        for start in range(1, len(lowered)):
            if not _wordy(lowered[start - 1]) and any(word.startswith(lowered[start:]) for word in self._words):
                return self._token_at(start)
        return self._tokens

    def push(self, text: str) -> Cue | None:
        """The cue that this token makes certain. Of several in one token, the first counts."""
        self._begins.append((len(self._text), self._tokens))
        self._text += text
        self._tokens += 1
        found = list(self._whole.finditer(self._text, 1))
        cue = None
        if found:
            cue = Cue(found[0][1].lower(), self._token_at(found[0].start()), self._token_at(found[0].end() - 1))
            self._forget(found[-1].end())
        self._forget(len(self._text) - self._longest - 1)
        return cue

    def _token_at(self, place: int) -> int:
        return next(token for begin, token in reversed(self._begins) if begin <= place)

    def _forget(self, place: int) -> None:
        """The text before `place` is in no cue to come; one character of it stays, to tell where words begin."""
        cut = place - 1
        if cut <= 0:
            return
        self._text = self._text[cut:]
        kept = [(max(0, begin - cut), token) for begin, token in self._begins if begin > cut]
        before = [token for begin, token in self._begins if begin <= cut]
        self._begins = ([(0, before[-1])] if before else []) + kept


def _wordy(character: str) -> bool:
    return character.isalnum() or character == "_"
