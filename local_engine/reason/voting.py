"""When have samples said enough, and whom to believe. No torch here.

Self-consistency (Wang et al. 2022, arXiv 2203.11171) takes the answer that most of a fixed number of samples give.
Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860) draws one after the other until a Beta posterior is sure
that the leading answer stays ahead of the next. Semantic entropy (Kuhn et al. 2023, arXiv 2302.09664) is the entropy of
the samples over what they mean; for short answers, over answer classes. RPC (Zhou et al. 2025, arXiv 2502.00511) weighs
an answer by the model's own probability of the different paths that lead to it, and prunes improbable paths.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from local_engine.plan_types import VoteStop, VoteWeight


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample that came to its end."""

    answer: str
    """Its class (`answers.py`); "" says nothing and counts for nobody."""
    logprob: float
    """Natural, of all its tokens together."""
    tokens: int
    lowest: float
    """The least of its tokens' log-probabilities."""
    path: int
    """Two samples with one number said the same, token by token."""


def weights(ballots: Sequence[Ballot], weigh: VoteWeight) -> dict[str, float]:
    """What each answer has going for it."""
    found: dict[str, float] = {}
    seen: set[int] = set()
    for ballot in ballots:
        if not ballot.answer or (weigh != "count" and ballot.path in seen):
            continue
        seen.add(ballot.path)
        found[ballot.answer] = found.get(ballot.answer, 0.0) + _weight(ballot, weigh)
    return found


def winner(ballots: Sequence[Ballot], weigh: VoteWeight) -> int:
    """The sample to show: of the answer with the most weight, the most probable per token. At least one is needed."""
    found = weights(ballots, weigh)
    most = max(found.values(), default=0.0)

    def rank(at: int) -> tuple[float, float]:
        ballot = ballots[at]
        weight = found.get(ballot.answer, -1.0)
        return (weight if weight < most - 1e-12 else most, ballot.logprob / max(1, ballot.tokens))

    return max(range(len(ballots)), key=rank)


def least_more(ballots: Sequence[Ballot], stop: VoteStop, bound: float, most: int) -> int:
    """How many further samples it would take to stop, if all agreed with the leader; `most` in all. 0: enough."""
    left = most - len(ballots)
    counts = Counter(ballot.answer for ballot in ballots if ballot.answer)
    ranked = [count for _, count in counts.most_common()] + [0, 0]
    for more in range(left):
        if _enough([ranked[0] + more, *ranked[1:]], stop, bound, left - more):
            return more
    return left


def lead_probability(first: int, second: int) -> float:
    """P(the leading answer is the likelier of the two) after so many votes each, from a uniform prior: the Beta
    distribution with parameters first + 1 and second + 1 above a half, which is a binomial's tail."""
    n = first + second + 1
    return float(sum(math.comb(n, k) for k in range(first + 1)) / 2**n)


def answer_entropy(counts: Sequence[int]) -> float:
    """Of the answers' shares, in nats."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count) if total else math.inf


def _enough(ranked: Sequence[int], stop: VoteStop, bound: float, left: int) -> bool:
    """`ranked`: the votes of each answer, descending; `left`: samples that may still be drawn."""
    first, second = ranked[0], ranked[1]
    if first - second > left and stop != "never":
        return True  # nobody can catch up
    match stop:
        case "posterior":
            return lead_probability(first, second) >= bound
        case "entropy":
            return sum(ranked) >= 3 and answer_entropy(ranked) <= 1 - bound
        case "agreement":
            return sum(ranked) == first >= 3
        case "never":
            return False


def _weight(ballot: Ballot, weigh: VoteWeight) -> float:
    match weigh:
        case "count":
            return 1.0
        case "perplexity":
            return math.exp(ballot.logprob / max(1, ballot.tokens))
        case "probability":
            return math.exp(ballot.logprob)
