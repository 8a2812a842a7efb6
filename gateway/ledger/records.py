"""One request and its attempts on their way to the ledger: the rows of `tables`, as light structs for the hot path.

The fields are those of the tables, name by name (a test compares them). The journal holds them by position: a new field
comes last and has a default, so that what an older version wrote is still read.
"""

from typing import Literal

import msgspec

from gateway.ledger.settle import Usage

AttemptKind = Literal[
    "first", "retry", "fallback", "hedge", "resume", "escalation", "beside", "shadow", "judge",
    "draft", "verify", "step", "think", "answer",
]  # fmt: skip
"""Why an attempt was made. Of a cascade: asked at the same time as the one before (`beside`). Of a plan: a smaller
model wrote (`draft`); what stands was looked at (`verify`); the model wrote a step, thought by itself, or answered."""


NOT_ACCEPTED = "not_accepted"
"""Of an attempt: its answer, or its step of a thought, was not good enough."""
AGREED = "agreed"
"""It gave the answer which another one was sent for."""
NOT_NEEDED = "not_needed"
"""It was stopped as nothing that it could still have said would have changed what is sent."""
LEFT = "left"
"""It was ended as its thought had come far enough."""
HEDGE_LOST = "hedge_lost"
"""The attempt beside it answered sooner."""
UNFAILED = frozenset({"ok", NOT_ACCEPTED, AGREED, NOT_NEEDED, LEFT, HEDGE_LOST})
"""Outcomes of attempts at which nothing failed."""


class AttemptRecord(msgspec.Struct, array_like=True):
    id: str
    request_id: str
    seq: int
    model: str
    provider: str
    started_at_ms: int
    first_byte_us: int | None = None
    duration_us: int = 0
    outcome: str = "running"
    upstream_status: int | None = None
    error: str | None = None
    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nanousd: int | None = 0
    cost_estimated: bool = False
    kind: AttemptKind = "first"

    def bill(self, usage: Usage, cost: int | None) -> None:
        self.input_tokens = usage.input
        self.cached_input_tokens = usage.cached_input
        self.cache_write_tokens = usage.cache_write
        self.output_tokens = usage.output
        self.reasoning_tokens = usage.reasoning
        self.cost_nanousd = cost
        self.cost_estimated = usage.estimated

    @property
    def failed(self) -> bool:
        """Something broke, or its caller or its time was gone."""
        return self.outcome not in UNFAILED


class RequestRecord(msgspec.Struct, array_like=True):
    id: str
    created_at_ms: int
    tenant: str
    key_id: str
    endpoint: str
    stream: bool
    model_requested: str
    session: str | None = None
    scope: str | None = None
    model_served: str | None = None
    provider: str | None = None
    route: str = ""
    policy_version: str = ""
    decision: str | None = None
    outcome: str = "running"
    http_status: int = 0
    error_code: str | None = None
    cache: str = "off"
    attempts: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nanousd: int | None = 0
    cost_estimated: bool = False
    baseline_nanousd: int | None = None
    reserved_nanousd: int = 0
    """All that was held for its attempts, each at the most that it could cost: the sum, as the cost is."""
    first_byte_us: int | None = None
    duration_us: int = 0
    overhead_us: int = 0
    team: str | None = None
    degraded: str | None = None
    """What was given up for the budget's or the signals' sake; None: nothing."""
    idempotency_key: str | None = None
    trace_id: str | None = None
    parent: str | None = None
    """The request whose shadow this is; None: a caller's own."""
    prompt_hash: str | None = None
    facts: str | None = None
    plan: str | None = None
    """What a plan did for the answer, as JSON: `kind`, and counts by name; None: there was none."""

    def total(self, attempts: list[AttemptRecord]) -> None:
        """Sum the attempts into the request: the request's cost is exactly what its attempts cost."""
        self.attempts = len(attempts)
        if len(attempts) == 1:
            only = attempts[0]
            self.input_tokens, self.cached_input_tokens = only.input_tokens, only.cached_input_tokens
            self.cache_write_tokens, self.output_tokens = only.cache_write_tokens, only.output_tokens
            self.reasoning_tokens = only.reasoning_tokens
            self.cost_nanousd, self.cost_estimated = only.cost_nanousd, only.cost_estimated
            return
        self.input_tokens = sum(a.input_tokens for a in attempts)
        self.cached_input_tokens = sum(a.cached_input_tokens for a in attempts)
        self.cache_write_tokens = sum(a.cache_write_tokens for a in attempts)
        self.output_tokens = sum(a.output_tokens for a in attempts)
        self.reasoning_tokens = sum(a.reasoning_tokens for a in attempts)
        costs = [a.cost_nanousd for a in attempts]
        self.cost_nanousd = None if any(c is None for c in costs) else sum(c for c in costs if c is not None)
        self.cost_estimated = any(a.cost_estimated for a in attempts)
