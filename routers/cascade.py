"""A cascade before it runs, and its acceptance of an answer while it does.

Before: a weak model answers first, and the strong one where that answer is not accepted. With p the chance that the
weak model's answer is right, and the shares of right and of wrong answers that the accept rule keeps (measured on
held-out answers, as part of the rule):

    P(accept)  = p keeps_right + (1 - p) keeps_wrong
    P(success) = p keeps_right + P(escalate) P(strong is right)
    cost       = cost of weak + P(escalate) cost of strong

P(strong is right) is taken for all queries alike: those that escalate are harder, so P(success) is somewhat hopeful.

While: P(correct | answer) of the rule's logistic regression over the answer's log probabilities and length.
"""

import math
from collections.abc import Sequence

from routers.types import Accept, AnswerFeature


def p_accept(p: float, accept: Accept) -> float:
    """The chance that an answer is accepted which is right with probability `p`."""
    return p * accept.keeps_right + (1 - p) * accept.keeps_wrong


def p_success(p: float, p_next: float, accept: Accept) -> float:
    """The chance that a stage and what follows it end in a right answer. `p_next`: of what follows, once asked."""
    return p * accept.keeps_right + (1 - p_accept(p, accept)) * p_next


def answer_features(logprobs: Sequence[float]) -> dict[AnswerFeature, float] | None:
    """The features of an answer by its tokens' log probabilities; None: it has none, or one of them is no number."""
    if not logprobs or not all(math.isfinite(value) for value in logprobs):
        return None
    return {
        "mean_logprob": math.fsum(logprobs) / len(logprobs),
        "min_logprob": min(logprobs),
        "log_tokens": math.log(len(logprobs)),
    }


def p_correct(accept: Accept, logprobs: Sequence[float]) -> float | None:
    """P(correct | answer), by the rule; None: the answer cannot be judged."""
    features = answer_features(logprobs)
    if features is None:
        return None
    score = accept.bias + math.fsum(weight * features[name] for name, weight in accept.weights)
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def accepts(accept: Accept, logprobs: Sequence[float]) -> bool:
    """Whether the answer is good enough to be sent. One that cannot be judged is not."""
    p = p_correct(accept, logprobs)
    return p is not None and p >= accept.at_least
