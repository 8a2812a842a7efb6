"""A cascade before it runs, and its acceptance of an answer while it does.

Before: a weak model answers first, and the strong one where that answer is not accepted. With p the chance that the
weak model's answer is right, and the shares of right and of wrong answers that the accept rule keeps (measured on
held-out answers, as part of the rule):

    P(accept)  = p keeps_right + (1 - p) keeps_wrong
    P(success) = p keeps_right + p (1 - keeps_right) P(next | right) + (1 - p) (1 - keeps_wrong) P(next | wrong)
    cost       = cost of weak + P(escalate) cost of strong

What escalates is harder than the rest, so P(next is right) of all queries would flatter a cascade. Abilities are taken
to be nested: what the weaker model of the two solves, the stronger one solves as well (`after`).

Where a rule asks for agreement and was not measured, each stage is taken to err by itself, and wrong answers to be the
same: right ones are kept as often as the others are right, too, and wrong ones as often as they are wrong.

While: P(correct | answer) of the rule's logistic regression over the answer's log probabilities and length.
"""

import math
from collections.abc import Sequence

from routers.types import Accept, AnswerFeature


def kept(accept: Accept, p_others: Sequence[float | None]) -> tuple[float, float] | None:
    """The shares of the first stage's right and wrong answers that are accepted. `p_others`: P(success) of the stages
    that may agree with it. None: not measured, and one of them is not known."""
    if accept.keeps_right is not None and accept.keeps_wrong is not None:
        return accept.keeps_right, accept.keeps_wrong
    right = wrong = 1.0
    for p in p_others[: accept.agree - 1]:
        if p is None:
            return None
        right, wrong = right * p, wrong * (1 - p)
    return right, wrong


def p_accept(p: float, keeps: tuple[float, float]) -> float:
    """The chance that an answer is accepted which is right with probability `p`."""
    return p * keeps[0] + (1 - p) * keeps[1]


def p_success(p: float, p_next: float, keeps: tuple[float, float]) -> float:
    """The chance that a stage and what follows it end in a right answer. `p_next`: of what follows, of all queries."""
    if_right, if_wrong = after(p, p_next)
    return p * (keeps[0] + (1 - keeps[0]) * if_right) + (1 - p) * (1 - keeps[1]) * if_wrong


def after(p: float, p_next: float) -> tuple[float, float]:
    """P(next is right | this one is right), and | this one is wrong, where the better one solves all the other does."""
    if p <= p_next:
        return 1.0, 0.0 if p == 1 else (p_next - p) / (1 - p)
    return p_next / p, 0.0


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
