"""The words of speculation: what a proposer sees of a sequence, and what it hands to verification."""

from collections.abc import Sequence as Sized
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from local_engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next in one sequence, the next one first; often right, never trusted."""

    tokens: list[int]
    grades: list[int]
    """For each token the class of evidence it rests on. How often tokens of a class are right is learned as they are
    verified, so a grade has no meaning beyond its proposer."""
    distributions: torch.Tensor | None = None
    """[tokens, vocabulary]: the distribution each token was drawn from; None where it was certain (a point mass)."""

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens.

        Where tokens were drawn from distributions, `length` must not depend on the drawn tokens it leaves out: dropping
        a token for what it is and drawing another would favour the tokens that are never dropped.
        """
        if length >= len(self.tokens):
            return self
        distributions = None if self.distributions is None else self.distributions[:length]
        return Draft(self.tokens[:length], self.grades[:length], distributions)


NOTHING = Draft([], [])


class Worth(Enum):
    """What to do about the next token of every draft, before it is drawn."""

    LEAVE = 0
    """End here."""
    LAST = 1
    """Draft it, and end: the pass that it came from is spent."""
    GO_ON = 2


class Weigh(Protocol):
    """Tells a proposer that spends forward passes how far to go."""

    @property
    def floor(self) -> float:
        """Where a drafter itself holds all of a draft less probable than this, more of it is not worth a pass."""
        ...

    def begin(self, made: int) -> None:
        """What was to be read has been read; for so many tokens of each draft the pass has been made."""
        ...

    def __call__(self, sequences: Sized[Sequence], grades: Sized[Sized[int]]) -> Worth:
        """Asked before each token, with the grades of each draft, that of its next token the last."""
        ...


class Proposer(Protocol):
    """A source of drafts. On the engine's thread alone."""

    @property
    def name(self) -> str: ...

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        """A draft of at most `most` tokens for each sequence, in order; an empty one where there is none.

        A proposer that spends a forward pass on each token asks `weigh` before, or goes down to its floor.
        """
        ...

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """Learn from a step: `predictions[i]` is what the model holds most likely after `sequence.ids[:start]` and the
        first i of the drafted tokens, right or wrong ones."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended, or was cut back: drop what is kept for it."""
        ...


class Unweighed:
    """Drafts as long as they may be."""

    floor = 0.0

    def begin(self, made: int) -> None:
        """Nobody counts."""

    def __call__(self, sequences: Sized[Sequence], grades: Sized[Sized[int]]) -> Worth:
        return Worth.GO_ON


UNWEIGHED = Unweighed()
