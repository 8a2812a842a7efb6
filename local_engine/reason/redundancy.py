"""Leave when two thoughts in a row come to the same.

TrimR (Lin et al. 2025, arXiv 2505.17155) splits a thought at reflection words and has a verifier judge whether
adjacent parts reach the same answer: two that agree end overthinking; many that differ, past a length, end
underthinking with the best guess. Their verifier is an instruct model of 7B beside the stream; here a part comes to its
last number, which is free to read and holds for tasks whose answers are numbers.
"""

from collections import Counter
from dataclasses import dataclass

from local_engine.reason.thought import Kind, Moment, Verdict


@dataclass(slots=True)
class Redundancy:
    agree: int = 2
    """So many parts in a row."""
    most_parts: int = 8
    """After so many parts that never agreed, the thought is given up."""
    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = False

    def look(self, moment: Moment) -> Verdict:
        parts = [moment.thought.conclusion(*stretch) for stretch in moment.passes]
        last = parts[-self.agree :]
        if len(last) == self.agree and last[0] is not None and len(set(last)) == 1:
            return Verdict.EXIT
        lost = len(parts) >= self.most_parts and max(Counter(parts).values()) < self.agree
        return Verdict.EXIT if lost else Verdict.GO_ON

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON
