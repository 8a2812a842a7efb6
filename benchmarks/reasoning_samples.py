"""Votes: how many samples it takes to answer as well as sixteen do. Synthetic arithmetic, temperature 0.7.

Sixteen samples of every question are drawn once, which is self-consistency; the other stop rules and weights are
replayed on them, in the order of their numbers. The default rule is run by the engine as well, which draws only what
it needs. "Leave it off" is one greedy answer. High effort, of three times the tokens, is asked a part of the questions.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from measured import Measured
from reasoning_bench import PART_FOR_OTHERS, Bench
from reasoning_exits import questions, tell_time
from reasoning_run import Kind, Outcome

from local_engine.plan_types import Sampled, Vote, VoteStop, VoteWeight
from local_engine.reason.trajectories import Question, is_right
from local_engine.reason.voting import Ballot, least_more, winner
from local_engine.types import Effort

EFFORTS: Final[tuple[Effort, ...]] = ("low", "high")
TEMPERATURE: Final = 0.7
MAX_TOKENS: Final = 600
MOST: Final = 16
TOGETHER: Final = 4
"""Votes at a time: sixteen samples each."""
Rule = tuple[VoteStop, float, VoteWeight]
RULES: Final[dict[str, Rule]] = {
    "self-consistency, 16, by probability (RPC)": ("never", 0.9, "probability"),
    "posterior 0.9, by probability": ("posterior", 0.9, "probability"),
    "posterior 0.9, by count": ("posterior", 0.9, "count"),
    "posterior 0.9, by perplexity": ("posterior", 0.9, "perplexity"),
    "posterior 0.95, by probability": ("posterior", 0.95, "probability"),
    "entropy at most 0.5, by probability": ("entropy", 0.5, "probability"),
    "first three agree, by probability": ("agreement", 0.9, "probability"),
}
COLUMNS: Final = {
    "accuracy": "right", "points_over_16": "points over 16", "samples": "samples", "tokens": "tokens",
    "tokens_saved": "tokens saved", "cpu_saved": "CPU saved", "wall_saved": "wall saved",
}  # fmt: skip


def measure(bench: Bench, into: Measured) -> None:
    asked, timed = (questions(bench.seed, bench.levels, n) for n in (bench.problems, bench.timed))
    low, high = EFFORTS
    some = asked[: len(asked) // PART_FOR_OTHERS]
    parts = ((low, asked), (high, some))
    bench.all_of([partial(_measure, replace(bench, batch=TOGETHER), *part, timed, into) for part in parts])


def _measure(
    bench: Bench, effort: Effort, asked: Sequence[Question], timed: Sequence[Question], into: Measured
) -> None:
    common = Kind("", effort=effort, temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    drawn = replace(common, name=f"{effort}: self-consistency, 16", plan=Vote(stop="never", weigh="count"))
    ways = [
        drawn,
        replace(common, name=f"{effort}: leave it off: one, greedy", temperature=0.0),
        replace(common, name=f"{effort}: adaptive (default)", plan=Vote()),
    ]
    answers, times = bench.ask(ways, (), ways, asked, timed)
    whole = answers[drawn.name]
    for way in ways:
        did = answers[way.name]
        samples = [len(use.samples) for use in did.uses()] or [1] * len(asked)
        _tell(way.name, did.right, samples, [end.output_tokens for end in did.finished], whole, into)
        tell_time(way.name, way.name, times, drawn.name, into)
    ballots = [_ballots(use.samples) for use in whole.uses()]
    for name, rule in RULES.items():
        votes_of = [replay(some, rule) for some in ballots]
        right = [is_right(said, one.answer) for (said, _, _), one in zip(votes_of, asked, strict=True)]
        used, tokens = [count for _, count, _ in votes_of], [count for _, _, count in votes_of]
        _tell(f"{effort}, replayed: {name}", right, used, tokens, whole, into)


def _ballots(samples: Sequence[Sampled]) -> list[Ballot]:
    """Paths of the same tokens have the same log-probability but for rounding."""
    return [
        Ballot(one.answer, one.logprob, one.tokens, one.lowest, hash((one.answer, one.tokens, round(one.logprob, 3))))
        for one in samples
    ]


def replay(ballots: Sequence[Ballot], rule: Rule) -> tuple[str, int, int]:
    """(the answer, samples drawn, tokens)."""
    stop, bound, weigh = rule
    drawn: list[Ballot] = []
    while more := least_more(drawn, stop, bound, MOST):
        drawn = list(ballots[: len(drawn) + more])
    return drawn[winner(drawn, weigh)].answer, len(drawn), sum(one.tokens for one in drawn)


def _tell(
    name: str, right: Sequence[bool], samples: Sequence[int], tokens: Sequence[int], whole: Outcome, into: Measured
) -> None:
    n = len(right)
    into.add(name, "accuracy", sum(right) / n, "share")
    into.add(name, "problems", n, "problems")
    into.add_points(name, "points_over_16", right, whole.right)
    into.add(name, "samples", sum(samples) / n, "samples")
    into.add(name, "tokens", sum(tokens) / n, "tokens")
    into.add(name, "tokens_saved", 1 - sum(tokens) / whole.tokens, "share")
