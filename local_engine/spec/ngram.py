"""Prompt lookup: what followed the last time these same tokens were there (Saxena 2023; LLMA, Yang et al. 2023)."""

from array import array
from collections.abc import Sequence as Sized

from local_engine.sequence import Sequence
from local_engine.spec.draft import NOTHING, UNWEIGHED, Draft, Weigh

_SHORTEST = 2  # tokens that must agree before a match counts
_LONGEST = 32  # agreement beyond this is not measured
_CANDIDATES = 16  # earlier places looked at in one search, the latest first
_GRADE_OF_LENGTH = [0, 0, 0, 1, 2, 2, 3, 3, 3, 4]  # by tokens that agree; longer ones as the last


class SuffixIndex:
    """Finds where the end of a growing token list occurred before, in constant time per token.

    Each place points back to the last place with the same two tokens, as the hash chains of LZ77 compressors do: eight
    bytes a token and one dictionary entry for each pair of tokens. A match is followed for as long as it goes on; only
    where it breaks are candidates compared. Once `most_tokens` are held, the older half is dropped.
    """

    def __init__(self, most_tokens: int = 32768) -> None:
        self._most = most_tokens
        self._tokens = array("i")
        self._before = array("i")  # for each place: the last place before it that ends in the same pair, or -1
        self._latest: dict[tuple[int, int], int] = {}
        self._seen = 0  # tokens ever pushed
        self._match = -1  # the place whose following tokens are proposed
        self._length = 0

    def __len__(self) -> int:
        """Tokens pushed so far, dropped ones included."""
        return self._seen

    @property
    def held(self) -> int:
        """Tokens in the index now."""
        return len(self._tokens)

    def extend(self, tokens: Sized[int]) -> None:
        for token in tokens:
            self._push(token)
            if len(self._tokens) > self._most:
                self._drop_older_half()

    def following(self, most: int) -> tuple[list[int], int]:
        """(at most `most` tokens that followed the longest match, the match's length). Empty and 0 without one.

        A match that runs into the end of the list goes on with what it proposed itself: a repetition is proposed as
        one that never ends.
        """
        if not self._length:
            return [], 0
        start, end = self._match + 1, len(self._tokens)
        period = end - start
        found = self._tokens[start : start + most].tolist()
        while len(found) < most:
            found.append(found[len(found) - period])
        return found, self._length

    def _push(self, token: int) -> None:
        place = len(self._tokens)
        self._tokens.append(token)
        self._seen += 1
        if not place:
            self._before.append(-1)
            return
        pair = (self._tokens[place - 1], token)
        before = self._latest.get(pair, -1)
        self._before.append(before)
        self._latest[pair] = place
        if self._length and self._tokens[self._match + 1] == token:
            self._match += 1
            self._length += 1
        else:
            self._search(place, before)

    def _search(self, place: int, candidate: int) -> None:
        self._match, self._length = -1, 0
        for _ in range(_CANDIDATES):
            if candidate < 0:
                return
            length = self._agreement(candidate, place)
            if length > self._length:
                self._match, self._length = candidate, length
            candidate = self._before[candidate]

    def _agreement(self, one: int, other: int) -> int:
        length = _SHORTEST  # they are in one chain
        while length < _LONGEST and one >= length and self._tokens[one - length] == self._tokens[other - length]:
            length += 1
        return length

    def _drop_older_half(self) -> None:
        kept = self._tokens[len(self._tokens) - self._most // 2 :]
        seen = self._seen
        self._tokens, self._before, self._latest = array("i"), array("i"), {}
        self._match, self._length = -1, 0
        for token in kept:
            self._push(token)
        self._seen = seen


class NGramProposer:
    """Copies from the sequence's own prompt and answer. Costs microseconds; pays where text repeats itself."""

    name = "ngram"

    def __init__(self, most_tokens: int = 32768) -> None:
        self._most_tokens = most_tokens
        self._indexes: dict[Sequence, SuffixIndex] = {}

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh = UNWEIGHED) -> list[Draft]:
        return [self._draft(sequence, most) for sequence in sequences]

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """Nothing to learn: the next proposal reads the sequence itself."""

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def _draft(self, sequence: Sequence, most: int) -> Draft:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = SuffixIndex(self._most_tokens)
        index.extend(sequence.ids[len(index) :])
        tokens, length = index.following(most)
        if not tokens:
            return NOTHING
        grade = _GRADE_OF_LENGTH[min(length, len(_GRADE_OF_LENGTH) - 1)]
        return Draft(tokens, [grade] * len(tokens))
