"""What the gateway says of a request, typed and frozen. Money is exact: integers of nano-dollars, or `Decimal` dollars.

Fields that a newer gateway adds are ignored, so that an older SDK goes on working.
"""

from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field


def usd(nanousd: int) -> Decimal:
    """Nano-dollars in dollars, exactly."""
    return Decimal(nanousd).scaleb(-9) if nanousd else Decimal(0)


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Plan(_Said):
    kind: str
    """`single`: one model answers. `cascade`: the first, and the next ones where its answer is not accepted."""
    model: str
    effort: str | None = None


class Candidate(_Said):
    """One considered model; `rejected` says why it lost and is empty for the chosen one and the reserves."""

    model: str
    p_success: float | None
    p_low: float | None
    p_high: float | None
    expected_cost_nanousd: int | None
    """None: the price is not known, which is not: free."""
    worst_cost_nanousd: int | None
    rejected: str


class Decision(_Said):
    """Which model, by which rule, over which others."""

    plan: Plan
    route: str
    rule: str
    candidates: tuple[Candidate, ...]
    fallbacks: tuple[str, ...]
    on_cause: dict[str, tuple[str, ...]] = {}
    """Fallbacks for one cause of failure, in place of `fallbacks`."""
    worst_case_nanousd: int | None = None
    """The most that the request can cost with every retry, fallback and hedge; said by `explain`, where all prices are
    known."""
    policy_version: str
    probe_version: str | None
    degraded: str

    @property
    def model(self) -> str:
        return self.plan.model


class Attempt(_Said):
    """One upstream call. Token classes do not overlap."""

    kind: str
    """Why it was made: `first`, `retry`, `fallback`, `hedge`, `resume`, `shadow` or `judge`."""
    model: str
    provider: str
    outcome: str
    upstream_status: int | None
    error: str | None
    first_byte_us: int | None
    duration_us: int
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_nanousd: int | None
    cost_estimated: bool


class Outcome(_Said):
    """What one source said of one model's answer."""

    request_id: str
    source: str
    model: str
    score: float
    """From 0, rejected, to 1, accepted."""
    comment: str | None
    created_at_ms: int


class Receipt(_Said):
    """What became of one request and what it cost, from the ledger."""

    request_id: str = Field(validation_alias="id")
    model: str | None = Field(validation_alias="model_served")
    model_requested: str
    provider: str | None
    route: str
    team: str | None
    scope: str | None
    """The agent run."""
    degraded: str | None
    """What was given up for a budget's or the signals' sake; None: nothing."""
    outcome: str
    http_status: int
    error_code: str | None
    stream: bool
    cache: str
    """`off`, `miss` or `hit`."""
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_nanousd: int | None
    """None: the price is not known, which is not: free."""
    cost_estimated: bool
    baseline_nanousd: int | None
    """The same tokens at the price of the dearest candidate."""
    first_byte_us: int | None
    duration_us: int
    plan: dict[str, int | float | str] | None = None
    """What a plan did for the answer: its kind, and counts by name."""
    attempts: tuple[Attempt, ...] = Field(validation_alias="attempt_rows")
    decision: Decision | None
    """None where nothing was decided: an answer from the cache, or a request that ended before."""
    feedback: tuple[Outcome, ...] = ()

    @property
    def cost_usd(self) -> Decimal | None:
        return None if self.cost_nanousd is None else usd(self.cost_nanousd)


class RouteFact(_Said):
    """What became of one route of the policy."""

    route: str
    taken: bool
    why: str
    """The first condition that does not hold; of the one taken, all its conditions."""


class Explanation(_Said):
    """The decision that a request would get now. `print` it to read it."""

    decision: Decision
    routes: tuple[RouteFact, ...] = ()
    """In order, up to the one that takes the request."""
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ModelSpend(_Said):
    model: str | None
    """None: requests that no model served."""
    requests: int
    cost_nanousd: int
    cache_hits: int

    @property
    def cost_usd(self) -> Decimal:
        return usd(self.cost_nanousd)


class Spend(_Said):
    """Sums over the ledger since `since_ms`."""

    since_ms: int
    tenant: str | None
    """None: all tenants."""
    requests: int
    cost_nanousd: int
    savings_nanousd: int
    """Repriced: the same tokens at the price of the dearest candidate, less what they cost. Not a counterfactual."""
    unpriced: int
    """Requests whose price is not known; no sum contains them."""
    estimated: int
    cache_hits: int
    not_ok: int
    input_tokens: int
    output_tokens: int
    rated: int = 0
    """Requests of which somebody, or a judge, said what the answer was worth."""
    accepted: int = 0
    cost_of_pass_nanousd: int | None = None
    """What the rated requests cost, all attempts and shadows included, for each accepted one; None: none was."""
    by_model: tuple[ModelSpend, ...]

    @property
    def cost_usd(self) -> Decimal:
        return usd(self.cost_nanousd)
