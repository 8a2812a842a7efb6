"""Token recycling: what the model itself held likely the last time the same few tokens came (Luo et al. 2024).

Every verified row of logits names the model's favourite after its context, also the rows behind a wrong draft, which
would otherwise be thrown away. The paper keeps favourites by the last token alone, in a tree; here they are kept by
the last one to eight tokens, the longest context that is known decides (prediction by partial matching), and the draft
is a chain. That is the better trade for verification without a tree mask, and for small vocabularies, where one token
says little about the next.
"""

from array import array
from collections.abc import Sequence as Sized

from local_engine.sequence import Sequence
from local_engine.spec.draft import UNWEIGHED, Draft, Weigh

ORDERS = (8, 4, 2, 1)
"""Context lengths in tokens, the most telling first."""
_SURE = 3  # confirmations beyond this are not counted
UNKNOWN = len(ORDERS) * _SURE
"""The grade of a token repeated for want of anything known: drafts are as long as asked for, hopeless or not."""


class RecycleTable:
    """Favourite next tokens by hashed context, in `bytes_used` < 2 MB whatever the vocabulary; old entries give way."""

    def __init__(self, slots: int = 32768) -> None:
        self._slots = slots
        self._checks = {order: array("i", bytes(4 * slots)) for order in ORDERS}
        self._tokens = {order: array("i", bytes(4 * slots)) for order in ORDERS}
        self._counts = {order: array("b", bytes(slots)) for order in ORDERS}

    @property
    def bytes_used(self) -> int:
        arrays = (*self._checks.values(), *self._tokens.values(), *self._counts.values())
        return sum(len(held) * held.itemsize for held in arrays)

    def learn(self, salt: int, context: Sized[int], token: int) -> None:
        """The model's favourite after `context`, of which at most the last eight tokens matter, is `token`."""
        for order in ORDERS:
            if len(context) < order:
                continue
            slot, check = self._place(salt, context, order)
            counts, tokens = self._counts[order], self._tokens[order]
            if counts[slot] and self._checks[order][slot] == check and tokens[slot] == token:
                counts[slot] = min(_SURE, counts[slot] + 1)
            elif counts[slot] > 1:
                counts[slot] -= 1  # one surprise does not overturn what was confirmed
            else:
                self._checks[order][slot], tokens[slot], counts[slot] = check, token, 1

    def favourite(self, salt: int, context: Sized[int]) -> tuple[int, int] | None:
        """(token, grade) by the longest known context. The grade tells its length and how often it was confirmed."""
        for rank, order in enumerate(ORDERS):
            if len(context) < order:
                continue
            slot, check = self._place(salt, context, order)
            count = self._counts[order][slot]
            if count and self._checks[order][slot] == check:
                return self._tokens[order][slot], rank * _SURE + _SURE - count
        return None

    def _place(self, salt: int, context: Sized[int], order: int) -> tuple[int, int]:
        key = hash((salt, *context[-order:]))
        return key % self._slots, (key >> 32) & 0x7FFFFFFF


class RecycleProposer:
    """Chains of favourites. One table for all sequences of a model, so that each answer speeds up the next."""

    name = "recycle"

    def __init__(self, slots: int = 32768) -> None:
        self._table = RecycleTable(slots)

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh = UNWEIGHED) -> list[Draft]:
        return [self._draft(sequence, most) for sequence in sequences]

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        salt = hash(sequence.salt)
        recent = list(sequence.ids[max(0, start - ORDERS[0]) : start])
        for at, token in enumerate(predictions):
            self._table.learn(salt, recent, token)
            recent.extend(drafted[at : at + 1])

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept for one sequence; what it taught stays."""

    def _draft(self, sequence: Sequence, most: int) -> Draft:
        salt = hash(sequence.salt)
        recent = list(sequence.ids[-ORDERS[0] :])
        tokens: list[int] = []
        grades: list[int] = []
        while len(tokens) < most:
            token, grade = self._table.favourite(salt, recent) or (recent[-1], UNKNOWN)
            tokens.append(token)
            grades.append(grade)
            recent.append(token)
        return Draft(tokens, grades)
