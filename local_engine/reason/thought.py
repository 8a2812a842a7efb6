"""What is known of a thought while it is written, and what a rule may say of it. No torch here.

A rule is asked at *cues* (the thought is turning back on itself) or at *step ends* (a blank line), and answers: go on,
leave here, or ask, that is, force an answer at this place, look at it, and then say. A gateway can run the same rules
over a provider's stream, given each token's text and log-probability.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Final, Literal, Protocol

from local_engine.reason.answers import last_number

STEP_END: Final = "\n\n"
Kind = Literal["cue", "step"]


class Verdict(Enum):
    GO_ON = "go on"
    EXIT = "exit"
    ASK = "ask"


@dataclass(slots=True)
class Thought:
    """The tokens of one thought so far, without the marker that begins it."""

    prompt_tokens: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Natural; nan where not measured."""
    entropies: list[float] = field(default_factory=list)
    """Of the distributions that the tokens were drawn from, in nats; nan where not measured."""
    turns: list[int] = field(default_factory=list)
    """Where its passes begin after the first: at the cues met so far."""

    def __len__(self) -> int:
        return len(self.texts)

    def said(self, first: int, stop: int) -> str:
        return "".join(self.texts[first:stop])

    def conclusion(self, first: int, stop: int) -> str | None:
        """What the tokens from `first` to `stop` come to: their last number."""
        return last_number(self.said(first, stop))


@dataclass(frozen=True, slots=True)
class Moment:
    """A place at which a thought could be left: before its token `cut`."""

    thought: Thought
    kind: Kind
    cut: int
    hidden: Sequence[float] = ()
    """At the last token of the cue: the layers asked for, one after the other."""

    @property
    def passes(self) -> list[tuple[int, int]]:
        """(first, stop) of the stretches of the thought between its cues, up to here."""
        marks = [0, *(turn for turn in self.thought.turns if turn < self.cut), self.cut]
        return list(pairwise(marks))


class Rule(Protocol):
    """When to leave a thought. One object follows one thought."""

    kinds: frozenset[Kind]
    """The moments at which it wants to be asked."""
    measures: bool
    """Whether it reads log-probabilities and entropies."""

    def look(self, moment: Moment) -> Verdict: ...

    def heard(self, moment: Moment, answer: str) -> Verdict:
        """After `ASK`: the answer that was forced here, "" where none came to an end. Not `ASK` again."""
        ...


FEATURES: Final = (
    "cue",
    "log_tokens",
    "log_prompt_tokens",
    "pass_log_max_surprise",
    "pass_min_logprob",
    "pass_mean_logprob",
    "pass_log_mean_surprise",
    "pass_top3_surprise",
    "pass_max_entropy",
    "pass_mean_entropy",
    "pass_top3_entropy",
    "log_max_surprise",
    "mean_entropy",
    "cue_entropy",
    "agrees",
)
"""What a probe may read at a cue beside hidden states; `pass_`: since the cue before."""


def features(moment: Moment) -> list[float]:
    """The values of `FEATURES`, in that order. Linear in the length of the thought; once per cue."""
    thought, cut = moment.thought, moment.cut
    passes = moment.passes
    first, stop = passes[-1]
    surprises = _finite([-logprob for logprob in thought.logprobs[first:stop]])
    entropies = _finite(thought.entropies[first:stop])
    worst, doubtful = sorted(surprises)[-3:], sorted(entropies)[-3:]
    conclusions = [thought.conclusion(*stretch) for stretch in passes[-2:]]
    return [
        float(len(passes)),
        math.log1p(cut),
        math.log1p(thought.prompt_tokens),
        _log(worst[-1]),
        -worst[-1],
        -_mean(surprises),
        _log(_mean(surprises)),
        sum(worst),
        doubtful[-1],
        _mean(entropies),
        sum(doubtful),
        _log(max(_finite([-logprob for logprob in thought.logprobs[:cut]]))),
        _mean(_finite(thought.entropies[:cut])),
        _finite(thought.entropies[cut : cut + 1])[0],
        float(len(conclusions) == 2 and conclusions[0] is not None and conclusions[0] == conclusions[1]),
    ]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)] or [0.0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _log(value: float) -> float:
    return math.log(max(value, 0.0) + 1e-6)
