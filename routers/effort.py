"""How much a model should think about one query: off, low or high, with a budget of thinking tokens.

Two published rules, over the signals at hand:

    When to Reason (arXiv 2510.08731)   think where it is likely to pay: `needs_reasoning` from one half on
    DiffAdapt (arXiv 2510.19669)        by difficulty: little for easy queries, all of it for those in the middle, half
                                        the budget for the hardest, which rarely gain from more

`needs_reasoning` decides whether to think, `difficulty` how much. Where neither is known nothing is said to the model.
"""

from typing import get_args

from routers.aims import Thinking
from routers.types import Effort, Query, Signals

EFFORTS: tuple[Effort, ...] = get_args(Effort)
"""From the least to the most."""
PAYS_FROM = 0.5
EASY, HARD = 1 / 3, 2 / 3
HARD_SHARE = 0.5


def rank(effort: Effort) -> int:
    return EFFORTS.index(effort)


def at_most(effort: Effort | None, most: Effort | None) -> Effort | None:
    """The lesser of the two; None: no effort is stated, which `most` then is."""
    if most is None or effort is None:
        return most if effort is None else effort
    return effort if rank(effort) <= rank(most) else most


def budget(effort: Effort | None, thinking: Thinking) -> int | None:
    """The thinking tokens of an effort; None: as the model does by itself."""
    return None if effort is None else {"none": 0, "low": thinking.low_tokens, "high": thinking.high_tokens}[effort]


def by_signals(query: Query, signals: Signals, thinking: Thinking) -> tuple[Effort | None, int | None]:
    """(effort, thinking tokens) for this query; (None, None): nothing is known, or the caller has said what it wants.

    A hint of the caller lowers what the signals ask for, and never raises it.
    """
    most = query.hints.effort if query.hints is not None else None
    if query.reasoning is not None:
        return None, None
    pays, difficulty = signals.needs_reasoning, signals.difficulty
    effort: Effort | None = None
    share = 1.0
    if pays is not None and pays.value < PAYS_FROM:
        effort = "none"
    elif difficulty is not None:
        effort = "low" if difficulty.value < EASY else "high"
        share = HARD_SHARE if difficulty.value > HARD else 1.0
    elif pays is not None:
        effort = "high"
    capped = at_most(effort, most)
    tokens = budget(capped, thinking)
    if tokens is not None and capped == effort == "high":
        tokens = max(round(tokens * share), thinking.low_tokens)
    return capped, tokens
