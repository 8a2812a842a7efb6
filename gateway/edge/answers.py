"""What the paths that FastAPI serves answer, as /openapi.json states it.

An answer with a field that does not stand here, or of another type, fails its request with a 500: the tests of each
path see that before a caller does.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from gateway.admission.keys import Role
from gateway.ledger.spend import By
from gateway.ledger.tables import AttemptRow, RequestRow
from routers.policy import Price
from routers.units import Window


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(BaseModel):
    """A provider's own error may have more fields, and a code that is a number."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str | None
    param: str | None = None
    code: str | int | None = None


class ErrorAnswer(Answer):
    """Every refusal and failure, in OpenAI's shape."""

    error: ErrorDetail


class Liveness(Answer):
    status: Literal["alive"]
    version: str


class Readiness(Answer):
    status: Literal["ready", "not_ready"]
    unavailable: dict[str, str]
    """Model → why it cannot serve."""
    degraded: dict[str, str]
    """What the gateway does without for now (`database`, `redis`) → what that means; it serves all the same."""
    policy: str


class ModelEntry(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelEntry]


def _row(name: str, table: Any, **more: Any) -> type[Answer]:
    """A table's columns, but for those in `more`, which say otherwise."""
    columns: dict[str, Any] = {column: (field.annotation, ...) for column, field in table.model_fields.items()}
    return create_model(name, __base__=Answer, **(columns | more))


class Outcome(Answer):
    """What one source said of one model's answer."""

    request_id: str
    source: str
    model: str
    score: float
    comment: str | None
    created_at_ms: int


AttemptReceipt = _row("AttemptReceipt", AttemptRow)
Receipt = _row(
    "Receipt",
    RequestRow,
    plan=(dict[str, int | float | str] | None, ...),
    decision=(dict[str, Any] | None, ...),
    attempt_rows=(list[AttemptReceipt], ...),  # type: ignore[valid-type]
    feedback=(list[Outcome], ...),
)


class ModelSpend(Answer):
    model: str | None
    requests: int
    cost_nanousd: int
    cache_hits: int


class Spend(Answer):
    since_ms: int
    tenant: str | None
    scope: str | None
    requests: int
    cost_nanousd: int
    baseline_nanousd: int
    savings_nanousd: int
    unpriced: int
    estimated: int
    cache_hits: int
    not_ok: int
    input_tokens: int
    output_tokens: int
    rated: int
    accepted: int
    rated_cost_nanousd: int
    cost_of_pass_nanousd: int | None
    """What the rated requests cost for each that was accepted; null: none was."""
    by_model: list[ModelSpend]


class BudgetState(Answer):
    scope: str
    label: str
    window: Window
    limit_nanousd: int
    spent_nanousd: int
    reserved_nanousd: int
    remaining_nanousd: int
    resets_at_ms: int | None


class BudgetList(Answer):
    data: list[BudgetState]


class BudgetPage(BudgetList):
    next: str | None
    """The key name to continue after; null at the end."""


class RouteFact(Answer):
    route: str
    taken: bool
    why: str
    """The first condition that does not hold; of the one taken, all its conditions."""


class Explanation(Answer):
    decision: dict[str, Any]
    routes: list[RouteFact]
    """In order, up to the one that takes the request."""
    lines: list[str]


class Key(Answer):
    key_id: str
    name: str
    tenant: str
    team: str | None
    role: Role
    budget: str | None
    budget_nanousd: int | None
    budget_window: Window | None


class KeyList(Answer):
    data: list[Key]


class CreatedKey(Key):
    key: str
    """The key itself: the only time that it is shown."""


class GroupSpend(Answer):
    """Which of the first six there are depends on `by`."""

    key: str | None = None
    team: str | None = None
    tenant: str | None = None
    model: str | None = None
    key_id: str | None = None
    run: str | None = None
    requests: int
    cost_nanousd: int
    unpriced: int
    input_tokens: int
    output_tokens: int


class SpendBy(Answer):
    by: By
    since_ms: int
    until_ms: int
    data: list[GroupSpend]


class ModelPrice(Answer):
    model: str
    provider: str
    upstream: str
    price: Price | None


class ListedPrice(Answer):
    host: str
    model: str
    first_day: str | None = Field(alias="from")
    context: int | None
    price: Price


class Prices(Answer):
    models: list[ModelPrice]
    source: str
    data: list[ListedPrice]


class RouteRule(Answer):
    name: str
    rule: str


class PolicyInForce(Answer):
    version: str
    since_ms: int | None
    """When it was put in force; null: it is not a file that is watched."""
    refused: str | None
    """What is wrong with the file as it is now; null: nothing, it is in force."""
    providers: list[str]
    models: list[str]
    aliases: list[str]
    routes: list[RouteRule]
    limits: int
