"""Who writes the next step of a thought, by what one API call says of it.

The rules and their defaults are those of `local_engine.reason`, which has the papers; there they read tokens within the
decode loop, here the text of a step and, where a rule needs them, the log-probabilities that came with it. Of an
entropy only the likeliest tokens are known.
"""

from dataclasses import dataclass, field
from typing import Protocol

from gateway.stepping.said import Said
from local_engine.plan_types import SpeculateSteps
from local_engine.reason import entropy, glimprouter, specreason
from local_engine.reason.entropy import EntropySwitch
from local_engine.reason.method import Do
from local_engine.reason.speculative_thinking import LOOK, SpeculativeThinking
from local_engine.reason.steps import Boundary


@dataclass(frozen=True, slots=True)
class Ruling:
    """What follows what the draft wrote."""

    keep: int | None = None
    """So many of its tokens stand; None: all of them."""
    hand_over: bool = False
    """The base writes on."""
    tokens: int | None = None
    """So many tokens; None: to the end of the step."""


WRITE_ON = Ruling()


class Method(Protocol):
    """Of one thought."""

    look: int
    """Tokens of a step that are looked at before the rest is written; 0: the whole step."""
    draft_top: int
    """Alternatives of each token that the draft is asked for."""
    base_top: int
    rates: bool
    """The base rates each step by a digit before it stands."""

    def looked(self, said: Said) -> Ruling:
        """At the first tokens of a step, or at all of it."""
        ...

    def accepts(self, rating: float) -> bool: ...

    def written(self, said: Said) -> bool:
        """The base wrote: is it the draft's turn again?"""
        ...


@dataclass(slots=True)
class Rated:
    """SpecReason: the base rates each of the draft's steps by one digit, 0 to 9."""

    threshold: float = specreason.THRESHOLD
    look: int = 0
    draft_top: int = 0
    base_top: int = 0
    rates: bool = True

    def looked(self, said: Said) -> Ruling:
        return WRITE_ON

    def accepts(self, rating: float) -> bool:
        return rating >= self.threshold

    def written(self, said: Said) -> bool:
        return said.ended


@dataclass(slots=True)
class Glimpsed:
    """GlimpRouter: the entropy of a step's first token says who writes the step. The glimpse is thrown away."""

    threshold: float = glimprouter.THRESHOLD
    look: int = 1
    draft_top: int = glimprouter.GLIMPSE
    base_top: int = 0
    rates: bool = False

    def looked(self, said: Said) -> Ruling:
        unsure = bool(said.tokens) and said.tokens[0].entropy >= self.threshold
        return Ruling(keep=0, hand_over=unsure)

    def accepts(self, rating: float) -> bool:
        return True

    def written(self, said: Said) -> bool:
        return said.ended


@dataclass(slots=True)
class Doubted:
    """Speculative Thinking: words of doubt after a delimiter hand the thought over for a while."""

    look: int = LOOK
    draft_top: int = 0
    base_top: int = 0
    rates: bool = False
    _rule: SpeculativeThinking = field(default_factory=SpeculativeThinking)

    def looked(self, said: Said) -> Ruling:
        tokens = self._rule.handed_over(said.text)
        return Ruling(keep=0, hand_over=True, tokens=tokens) if tokens else WRITE_ON

    def accepts(self, rating: float) -> bool:
        return True

    def written(self, said: Said) -> bool:
        return True


@dataclass(slots=True)
class Unsure:
    """Entropy-adaptive: the base writes on from the token at which the draft's rolling mean rose over the threshold,
    step by step, until its own is under half of it."""

    rule: EntropySwitch
    look: int = 0
    draft_top: int = glimprouter.GLIMPSE
    base_top: int = glimprouter.GLIMPSE
    rates: bool = False

    def looked(self, said: Said) -> Ruling:
        for at, token in enumerate(said.tokens):
            if self.rule.drafted(token, token.text.encode(), Boundary.INSIDE).do is Do.HAND_OVER:
                return Ruling(keep=at, hand_over=True)
        return WRITE_ON

    def accepts(self, rating: float) -> bool:
        return True

    def written(self, said: Said) -> bool:
        calm = [self.rule.written(token, token.text.encode(), Boundary.INSIDE) for token in said.tokens]
        return not calm or calm[-1]


def method_of(plan: SpeculateSteps) -> Method:
    """The plan's. `score` judges tokens, which no API gives: policies are refused that ask for it here."""
    given = plan.threshold
    match plan.method:
        case "glimprouter":
            return Glimpsed(glimprouter.THRESHOLD if given is None else given)
        case "speculative_thinking":
            return Doubted()
        case "entropy":
            return Unsure(EntropySwitch(entropy.THRESHOLD if given is None else given, plan.window))
        case _:
            return Rated(specreason.THRESHOLD if given is None else given)
