"""How often drafts are right, learned while they are verified."""

from collections.abc import Iterable

from local_engine.sequence import Sequence
from local_engine.spec.draft import Draft

_ANY = -1  # stands for all grades
_PRIOR_TRIES = 4.0
_PRIOR = 0.5  # a class of evidence never tried yet is as likely right as wrong
_MEMORY = 400.0  # tries after which the oldest have faded, for all sequences together
_OWN_MEMORY = 60.0  # and for one sequence
_OWN_WEIGHT = 12.0  # tries of its own after which a sequence is judged by itself more than by the others


class _Rate:
    """Share of right ones among recent tries."""

    __slots__ = ("right", "tries")

    def __init__(self) -> None:
        self.right = 0.0
        self.tries = 0.0

    def add(self, right: bool, memory: float) -> None:
        if self.tries >= memory:
            self.right *= 1 - 1 / memory
            self.tries *= 1 - 1 / memory
        self.right += right
        self.tries += 1

    def shrunk(self, prior: float, weight: float) -> float:
        """The share, pulled towards `prior` as if `weight` tries had shown it."""
        return (self.right + prior * weight) / (self.tries + weight)


class Acceptance:
    """P(a drafted token is right | those before it were), by proposer and grade, for all sequences and for each."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, int], _Rate] = {}
        self._own: dict[Sequence, dict[str, _Rate]] = {}

    def chances(self, sequence: Sequence, proposer: str, grades: Iterable[int]) -> list[float]:
        """For each drafted token the chance that it and all before it are right: what it adds to the step's yield."""
        factor = self._leaning(sequence, proposer)
        chance, found = 1.0, []
        for grade in grades:
            chance *= min(0.999, factor * self._rate(proposer, grade))
            found.append(chance)
        return found

    def rate(self, sequence: Sequence, proposer: str) -> float:
        """P(right | those before it were) of a token of unknown grade."""
        overall = self._shared.get((proposer, _ANY))
        return min(
            0.999, self._leaning(sequence, proposer) * (_PRIOR if overall is None else overall.shrunk(_PRIOR, 1))
        )

    def learn(self, sequence: Sequence, proposer: str, draft: Draft, accepted: int) -> None:
        """Of the draft the first `accepted` tokens were right, and the next one, if there is one, was wrong."""
        own = self._own.setdefault(sequence, {}).setdefault(proposer, _Rate())
        for at, grade in enumerate(draft.grades[: accepted + 1]):
            expected = self._rate(proposer, grade)
            self._shared.setdefault((proposer, grade), _Rate()).add(at < accepted, _MEMORY)
            self._shared.setdefault((proposer, _ANY), _Rate()).add(at < accepted, _MEMORY)
            # kept as right ones per expected right one, so that one factor serves every grade
            own.right += at < accepted
            own.tries += expected
        if own.tries > _OWN_MEMORY:
            own.right *= _OWN_MEMORY / own.tries
            own.tries = _OWN_MEMORY

    def forget(self, sequence: Sequence) -> None:
        self._own.pop(sequence, None)

    def _rate(self, proposer: str, grade: int) -> float:
        rate = self._shared.get((proposer, grade))
        return _PRIOR if rate is None else rate.shrunk(_PRIOR, _PRIOR_TRIES)

    def _leaning(self, sequence: Sequence, proposer: str) -> float:
        """How much more often than others of their grade this sequence's drafts are right."""
        own = self._own.get(sequence, {}).get(proposer)
        return 1.0 if own is None else own.shrunk(1.0, _OWN_WEIGHT)
