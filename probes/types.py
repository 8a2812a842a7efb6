"""The words of the probes that cross a border. No torch, no numpy: routers and gateway workers import this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["static", "encoder", "prefill", "self"]
"""What a probe reads, from the cheapest to the dearest: the words, a small encoder's hidden states, the local model's
own at the end of the prompt, or what that model says of itself."""
Kind = Literal["correct", "out_tokens", "domain", "needs_reasoning"]
"""What a head foretells: P(correct), tokens of the answer, the probability of one domain, P(thinking first pays)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measured signal: a value, where it came from and what it cost to get."""

    value: float
    source: str
    """Probe artifact and head, e.g. `mmlu-minilm@3f2a9c/weak`."""
    low: float | None = None
    high: float | None = None
    """Interval at the artifact's stated level; None where it states none."""
    cost_us: int = 0


Bands = Sequence[tuple[float, float, float]]
"""(up to this probability, low, high), rising: what is true of a head's word, in 95% of cases."""


def interval(bands: Bands, p: float) -> tuple[float, float] | None:
    """The interval around a probability that a head gives, which it always holds; None: nothing is known of it."""
    for most, low, high in bands:
        if p <= most:
            return min(low, p), max(high, p)
    return None


@dataclass(frozen=True, slots=True)
class Rating:
    """What a model says of itself when it has read a prompt; None: it was not asked."""

    entropy: float
    """Of the first token of its answer, in nats."""
    p_true: float | None = None
    """P(yes), of yes and no, after a question about the prompt."""
    internal_confidence: float | None = None
    """The same, read off several layers and tokens."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe says of one query. What it abstains from is absent."""

    p_success: Mapping[str, float] = field(default_factory=dict)
    """Calibrated P(correct) per head."""
    undecided: frozenset[str] = frozenset()
    """Of these heads it knows hardly more than the base rate: a dearer tier, where there is one, is worth asking."""
    out_tokens: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Per head (expected, low, high) tokens of the answer; four of five answers lie between low and high."""
    domain: Mapping[str, float] = field(default_factory=dict)
    """Probability of each domain; they sum to one."""
    needs_reasoning: float | None = None
    """The chance that thinking before the answer pays."""
