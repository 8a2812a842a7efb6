"""Leave when the answers that are forced along the way have come to agree.

Answer convergence (Liu and Wang 2025, arXiv 2506.02536): "stop when the model's answer stabilises": an answer is forced
at the end of each chunk of the thought, and the thought ends when k in a row are the same. Every look costs the tokens
of one answer.
"""

from dataclasses import dataclass, field

from local_engine.reason.answers import answer_class
from local_engine.reason.thought import Kind, Moment, Verdict


@dataclass(slots=True)
class Convergence:
    agree: int = 2
    """So many answers in a row."""
    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = False
    _said: list[str] = field(default_factory=list)

    def look(self, moment: Moment) -> Verdict:
        return Verdict.ASK

    def heard(self, moment: Moment, answer: str) -> Verdict:
        self._said.append(answer_class(answer))
        last = self._said[-self.agree :]
        return Verdict.EXIT if len(last) == self.agree and last[0] and len(set(last)) == 1 else Verdict.GO_ON
