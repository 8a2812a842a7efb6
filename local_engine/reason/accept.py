"""Is an answer good enough to be sent, and is one that is being written worth its end? Pure Python: gateways ask, too.

FrugalGPT (Chen et al. 2023, arXiv 2305.05176) scores a cheap model's answer and asks a dearer model where the score is
low. Here the score is P(correct) by a logistic regression over what the model thought of its own tokens and, where the
rule says so, over its hidden states at the least probable one: what it was in doubt about. Acceptance is certified
elsewhere: the threshold of the rule is one for which "accepted and wrong" stays under a stated risk.

An attempt is abandoned as soon as the chance that it is accepted in the end, by a second regression over the same
features so far, is below the price of going on: what its remaining tokens cost, as a share of what acceptance saves.
"""

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Final

from local_engine.plan_types import AcceptRule, AnswerFeature

FIRST_LOOK: Final = 4
"""Tokens before which no attempt is abandoned: the first ones are certain in every answer."""


class AnswerWatch:
    """Follows one answer, token by token."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum = self._least = 0.0
        self._entropy_sum = self._most_entropy = 0.0
        self._least_at = -1
        self.doubt: Sequence[float] = ()
        """Hidden states at the least probable token; at the one before it while those are not known yet."""

    def push(self, logprob: float, entropy: float = 0.0) -> None:
        """One token more: its log-probability, and the entropy it was drawn from (nats)."""
        if self._least_at < 0 or logprob < self._least:
            self._least, self._least_at = logprob, self.tokens
        self.tokens += 1
        self._sum += logprob
        self._entropy_sum += entropy
        self._most_entropy = max(self._most_entropy, entropy)

    def in_doubt_at(self, token: int) -> bool:
        """Whether this is the least probable token so far, the first of which is 0."""
        return token == self._least_at

    def features(self) -> dict[AnswerFeature, float]:
        """Of at least one token."""
        return {
            "mean_logprob": self._sum / self.tokens,
            "min_logprob": self._least,
            "mean_entropy": self._entropy_sum / self.tokens,
            "max_entropy": self._most_entropy,
            "log_tokens": math.log(self.tokens),
        }


def p_correct(rule: AcceptRule, watch: AnswerWatch) -> float:
    """Of an answer that is written; 0.0 of one without tokens, whose log-probabilities are not numbers, or without the
    hidden states that the rule reads."""
    if rule.hidden_weights and len(watch.doubt) != len(rule.hidden_weights):
        return 0.0
    return _probability(rule.weights, rule.bias + math.fsum(map(mul, rule.hidden_weights, watch.doubt)), watch)


def accepts(rule: AcceptRule, watch: AnswerWatch) -> bool:
    return p_correct(rule, watch) >= rule.at_least


def abandons(rule: AcceptRule, watch: AnswerWatch) -> bool:
    """Whether to stop here an answer that is being written."""
    if rule.go_on_above <= 0 or watch.tokens < FIRST_LOOK:
        return False
    return _probability(rule.prospect_weights, rule.prospect_bias, watch) < rule.go_on_above


def price_of_going_on(tokens_left: float, token_cost: float, saved: float) -> float:
    """The chance of acceptance below which the tokens that are left cost more than acceptance saves on average."""
    return 1.0 if saved <= 0 else min(1.0, tokens_left * token_cost / saved)


def _probability(weights: Mapping[AnswerFeature, float], bias: float, watch: AnswerWatch) -> float:
    if not watch.tokens:
        return 0.0
    features = watch.features()
    score = bias + math.fsum(weight * features[name] for name, weight in weights.items())
    return 0.0 if not score > -700 else 1 / (1 + math.exp(-score))
