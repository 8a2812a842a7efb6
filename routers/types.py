"""The words that cross the routers' border: what is asked, what was measured, what was decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from probes.types import Estimate

Effort = Literal["none", "low", "high"]
Endpoint = Literal["chat.completions", "completions", "embeddings"]
"""What is asked for: an answer to a conversation, the raw continuation of a text, or vectors of texts."""


@dataclass(frozen=True, slots=True)
class Query:
    """One request as the routers see it: wire formats stay at the edge."""

    model: str
    """The name the caller asked for: a model of the policy, or an alias such as `auto`."""
    tenant: str
    input_tokens_estimate: int
    """Expected prompt tokens (an estimate, about one per four bytes)."""
    max_output_tokens: int | None
    """The caller's own cap, if any."""
    tags: frozenset[str] = frozenset()
    needs_tools: bool = False
    needs_format: bool = False
    """A JSON object or schema is asked for."""
    needs_logprobs: bool = False
    choices: int = 1
    endpoint: Endpoint = "chat.completions"
    inputs: int = 1
    """Texts to complete or to embed, each with a context window of its own."""
    input_tokens_max: int | None = None
    """No tokenizer makes more prompt tokens than this (the bytes of the body); None: not bounded but by the context."""
    text: bytes | memoryview | None = field(default=None, repr=False, compare=False)
    """The prompt as JSON, where all of it is text: read only when it may not fit, for the fewest tokens it can have."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What was measured for this query. Absent is absent, never zero."""

    p_success: dict[str, Estimate] = field(default_factory=dict)
    """Per model of the policy."""
    input_tokens: dict[str, int] = field(default_factory=dict)
    """Exact prompt tokens, for the models that could count them."""
    probe: Literal["ok", "unavailable", "not_asked"] = "not_asked"


@dataclass(frozen=True, slots=True)
class State:
    """A snapshot of the world at decision time."""

    unavailable: dict[str, str] = field(default_factory=dict)
    """Models that cannot serve now, each with the reason (`engine down`, `breaker open until …`)."""
    budget_remaining_nanousd: int | None = None
    """What the caller may still spend; None: no budget applies."""
    degrade: Literal["cheaper", "local"] | None = None
    """What the fullest of the caller's budgets turns routing to; `degrade_reason` says which."""
    degrade_reason: str = ""


@dataclass(frozen=True, slots=True)
class Single:
    """A plan: one model answers."""

    model: str
    effort: Effort | None = None
    kind: Literal["single"] = "single"


Plan = Single


@dataclass(frozen=True, slots=True)
class Candidate:
    """One considered model, and why it lost (empty for the one chosen)."""

    model: str
    p_success: float | None
    p_low: float | None
    p_high: float | None
    expected_cost_nanousd: int | None
    """None, as `worst_cost_nanousd`: the price is not known, which is not: free."""
    worst_cost_nanousd: int | None
    rejected: str = ""
    """Empty: chosen, or a fallback kept in reserve. Otherwise the constraint or comparison it lost, in words."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What will run and why. A pure function of (Query, Signals, Policy, State, seed)."""

    plan: Plan
    route: str
    """The route that matched; `named` where the caller named a model."""
    rule: str
    """The sentence that decided, e.g. `cheapest with p_success >= 0.9`."""
    candidates: tuple[Candidate, ...]
    fallbacks: tuple[str, ...]
    """Models to try, in order, when the plan's model fails before its first byte."""
    on_cause: Mapping[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True)
    """Fallbacks for one cause of failure, in place of `fallbacks`; complete for `context_length` and `content_filter`:
    where they are not named here, there is none. For `context_length`, only models whose context is not known to be
    as short."""
    resume: tuple[str, ...] = field(default=(), kw_only=True)
    """Models that may go on with a stream that broke, best first, each once; empty unless the route says `resume`."""
    policy_version: str
    probe_version: str | None
    seed: int
    degraded: str = ""
    """Why this decision is less than the policy wanted, or empty: `probe_unavailable`, `budget`, `unavailable`, and
    where `on_failure` steps in because no candidate can run, also `context_length` or `capability`."""
