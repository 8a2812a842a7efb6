"""Give each query its own number of thinking tokens, and leave at the first step end past it.

Plan-and-Budget (Lin et al. 2025, arXiv 2505.16122) splits a query into parts, gives each a share of tokens by how
uncertain it is, and holds the reasoning to them. Here the parts are not planned by a model, which would cost a
call: the budget is a quantile of what earlier queries of the same length needed, fitted on trajectories.
"""

from dataclasses import dataclass

from local_engine.reason.thought import Kind, Moment, Verdict


@dataclass(slots=True)
class TokenBudget:
    tokens: int
    kinds: frozenset[Kind] = frozenset({"cue", "step"})
    measures: bool = False

    def look(self, moment: Moment) -> Verdict:
        return Verdict.EXIT if moment.cut >= self.tokens else Verdict.GO_ON

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """Tokens = base + per_prompt_token * prompt tokens."""

    base: float
    per_prompt_token: float

    def of(self, prompt_tokens: int) -> TokenBudget:
        return TokenBudget(max(1, round(self.base + self.per_prompt_token * prompt_tokens)))
