"""What a route aims at, beside its objective: what quality and time are worth, when to explore, what to stay with."""

from dataclasses import dataclass
from typing import Literal

from routers.units import format_money

ExploreMethod = Literal["thompson", "softmax", "uniform"]
"""How an explored candidate is drawn: by its chance of being the best, by its mean reward, or each alike."""
ThinkingField = Literal["reasoning_effort", "enable_thinking", "thinking_budget"]
"""How a model is told how much to think: OpenAI's field, which the local engine reads, too; the `enable_thinking` of
chat templates (`chat_template_kwargs` of vLLM and SGLang); or that and a number of tokens (`thinking_budget`, Qwen)."""


@dataclass(frozen=True, slots=True)
class Worth:
    """The exchange rates of the objective `utility`, in nano-dollars."""

    point: int
    """One point of quality: a chance of a good answer higher by 0.01."""
    second: int = 0
    """One second until the end of the answer."""

    def __str__(self) -> str:
        each = f"{format_money(self.point)}/point"
        return f"{each}, {format_money(self.second)}/s" if self.second else each


@dataclass(frozen=True, slots=True)
class Explore:
    """Requests that are answered by another candidate than the best, to learn from it."""

    share: float
    """Exactly this share of the requests with more than one candidate to explore, in expectation over seeds."""
    method: ExploreMethod = "thompson"
    temperature: float = 0.1
    """Of `softmax`: mean rewards this far apart are drawn e times as often."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """Models that are asked the same beside the one that answers, to learn what they would have said."""

    models: tuple[str, ...]
    share: float
    """Of the route's requests, by their seeds."""
    judge: str | None = None
    """The model that compares the answers; None: nobody does."""
    keep: bool = False
    """Whether the prompt and the answers are stored, to learn from."""


@dataclass(frozen=True, slots=True)
class Affinity:
    """What it takes for a conversation to leave the model that answered it last."""

    ttl_ms: int
    """How long a provider keeps a prefix after it was last used."""
    comes_back: float = 0.5
    """How likely it is that a conversation comes back after its prefix has been dropped, and pays for it again."""
    release: float = 0.3
    """How much of a rise in p_success is believed at once; a fall is believed whole. 1: all of it."""
    bound: Literal["strip", "keep"] = "strip"
    """Of blocks that only the provider which made them reads again: leave them out elsewhere, or stay with it."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How much a model thinks before it answers, and how it is told."""

    field: ThinkingField
    low_tokens: int = 1024
    """The thinking budget of effort `low`, in tokens."""
    high_tokens: int = 8192
    off: str = "none"
    """The provider's word for no thinking, where the field takes words."""


TOLD_BY_EFFORT = Thinking("reasoning_effort")
"""The local engine's models, and OpenAI's."""

GuaranteedLoss = Literal["weak_wrong_strong_right", "accepted_wrong"]
"""What may not happen often: a candidate answers wrong where the last one would have been right; or the first one's
answer, taken by the probe's word, is wrong."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The proof behind a guarantee: a threshold on differences of p_success, certified on held-out rows."""

    candidates: tuple[str, ...]
    """In the order of the certificate: the first whose p_success is above the last one's by more than `threshold`
    answers, else the last. Of one alone: it answers where its p_success is above `threshold`."""
    threshold: float
    words: str
    """The certificate, for people."""


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A bound on how often a route's decisions lose."""

    loss: GuaranteedLoss
    at_most: float
    confidence: float | None = None
    """With which the bound holds; None: on average is enough."""
    bound: Bound | None = None
    """None: no certificate has been bound to it, and only the last candidate may answer."""

    def __str__(self) -> str:
        sure = "" if self.confidence is None else f" with {100 * self.confidence:g}% confidence"
        proof = "no certificate" if self.bound is None else f"threshold {self.bound.threshold:.4g}, {self.bound.words}"
        return f"guarantee {self.loss} <= {self.at_most:g}{sure} ({proof})"
