"""What can go wrong in the routers, and what the caller does about it.

RoutersError
├── PolicyError   the policy file is wrong: show the problems to the person who wrote it
└── NoCandidate   nothing the policy allows can answer this query: tell the caller, by `kind`
"""

from dataclasses import dataclass
from typing import Literal

NoCandidateKind = Literal[
    "unknown_model", "not_allowed", "context_length", "capability", "budget", "unavailable", "constraints"
]


class RoutersError(Exception):
    """Base of every error raised by the routers."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a policy file. Never holds a secret, not even one written where none belongs."""

    file: str
    line: int
    """Counted from 1."""
    field: str
    """Path of the field, e.g. `routes[1].when.tag`; empty for the file as a whole."""
    message: str
    fix: str
    """What to write instead, in words."""
    value: str | None = None
    """The value as written; None where there is none or where it must not be shown."""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " + (f"{self.field}: " if self.field else "")
        shown = f" (got {self.value})" if self.value is not None else ""
        return f"{where}{self.message}{shown}. Fix: {self.fix}" + ("" if self.fix.endswith("?") else ".")


class PolicyError(RoutersError):
    """A policy file that does not load, with everything found wrong in it, in line order."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.field)))
        super().__init__("\n".join(map(str, self.problems)))


class NoCandidate(RoutersError):
    """No model can run this query.

    `kind` is the obstacle of the model that came closest: one that is only `unavailable` now came closer than one
    over `budget`, and that one closer than one whose context is too short (`context_length`) or that lacks a feature
    (`capability`). `constraints`: models could run, but the route refuses when its constraints are not met.
    `not_allowed`: the caller named a model that the matching route does not offer, or that only other routes take.
    `unknown_model`: the name is neither a model nor an alias, and no route takes it.
    """

    def __init__(
        self,
        kind: NoCandidateKind,
        message: str,
        reasons: tuple[tuple[str, str], ...] = (),
        away: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.reasons = reasons
        """(model, why it cannot run), for each model considered."""
        self.away = away
        """The models that keep one considered from running only because they cannot serve now."""
        super().__init__("; ".join([message, *(f"{model}: {reason}" for model, reason in reasons)]))
