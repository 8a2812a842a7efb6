"""The SQL tables, the same on SQLite and on PostgreSQL. A change here needs a migration: see `migrations`.

Money is integers of nano-dollars (1 USD = 10**9); time is integers: milliseconds since the epoch for instants,
microseconds for durations. A NULL cost is *unpriced*, never zero.
"""

from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, String, Text
from sqlmodel import Field, SQLModel


def _big(*, nullable: bool = False) -> Any:
    return Field(default=None if nullable else 0, sa_column=Column(BigInteger, nullable=nullable))


def _later(default: int = 0) -> Any:
    """A count that a later step added: the rows that were there got `default`."""
    return Field(default=default, sa_column=Column(BigInteger, nullable=False, server_default=str(default)))


_RUN = String(200).with_variant(String(200, collation="C"), "postgresql")
"""Ordered byte by byte on both databases, so that a run and all below it are one range of an index."""


class ApiKey(SQLModel, table=True):
    """A caller's key: only its HMAC is kept; looked up by its public id."""

    __tablename__ = "api_key"

    id: str = Field(primary_key=True, max_length=16)
    name: str = Field(max_length=64, unique=True)
    tenant: str = Field(max_length=64, index=True)
    role: str = Field(max_length=16)
    """admin, user or reader."""
    hash: str = Field(max_length=64)
    created_at_ms: int = _big()
    revoked_at_ms: int | None = _big(nullable=True)
    budget_nanousd: int | None = _big(nullable=True)
    budget_window: str | None = Field(default=None, max_length=8)
    team: str | None = Field(default=None, max_length=64)
    created_by: str | None = Field(default=None, max_length=64)
    """The key that made this one; None: the command line, or the first start."""


class KeyChange(SQLModel, table=True):
    """One row: how often any key has changed. Workers poll it instead of all keys."""

    __tablename__ = "key_change"

    id: int = Field(primary_key=True)
    count: int = _big()


class IdempotencyRow(SQLModel, table=True):
    """One per Idempotency-Key of an API key: who runs it, or what came of it."""

    __tablename__ = "idempotency"

    key_id: str = Field(primary_key=True, max_length=16)
    idempotency_key: str = Field(primary_key=True, max_length=255)
    body_hash: str = Field(max_length=64)
    request_id: str = Field(max_length=40)
    owner: str = Field(max_length=32)
    """The process that runs it."""
    lease_until_ms: int = _big()
    """Renewed while the owner lives."""
    expires_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False, index=True))
    status: int | None = None
    """NULL while it runs."""
    content_type: str | None = Field(default=None, max_length=64)
    body: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))
    """NULL as well where the answer was too large to keep."""


class RequestRow(SQLModel, table=True):
    """One per admitted request, whatever happened to it."""

    __tablename__ = "request"
    __table_args__ = (
        Index("request_by_key_time", "key_id", "created_at_ms"),
        Index("request_by_run", "key_id", "scope"),
    )

    id: str = Field(primary_key=True, max_length=40)
    created_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False, index=True))
    tenant: str = Field(max_length=64)
    key_id: str = Field(max_length=16)
    endpoint: str = Field(max_length=32)
    stream: bool
    session: str | None = Field(default=None, max_length=128)
    scope: str | None = Field(default=None, sa_column=Column(_RUN, nullable=True))
    """Path of the agent run."""
    model_requested: str = Field(max_length=256)
    model_served: str | None = Field(default=None, max_length=128)
    provider: str | None = Field(default=None, max_length=128)
    route: str = Field(default="", max_length=128)
    policy_version: str = Field(default="", max_length=64)
    decision: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    outcome: str = Field(max_length=16)
    http_status: int
    error_code: str | None = Field(default=None, max_length=64)
    cache: str = Field(default="off", max_length=8)
    attempts: int = 0
    input_tokens: int = _big()
    cached_input_tokens: int = _big()
    cache_write_tokens: int = _big()
    output_tokens: int = _big()
    reasoning_tokens: int = _big()
    cost_nanousd: int | None = _big(nullable=True)
    cost_estimated: bool = False
    baseline_nanousd: int | None = _big(nullable=True)
    reserved_nanousd: int = _big()
    """All that was held for its attempts: no less than they cost, as long as providers keep to `max_tokens`."""
    first_byte_us: int | None = _big(nullable=True)
    duration_us: int = _big()
    overhead_us: int = _big()
    team: str | None = Field(default=None, max_length=64)
    degraded: str | None = Field(default=None, max_length=128)
    idempotency_key: str | None = Field(default=None, max_length=255)
    trace_id: str | None = Field(default=None, max_length=32)
    parent: str | None = Field(default=None, max_length=40)
    """The request whose shadow this is; NULL: a caller's own."""
    prompt_hash: str | None = Field(default=None, max_length=32)
    """Keyed, of the conversation as it came (`gateway.facts`); NULL as `facts`."""
    facts: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    """What the decision was made from (`gateway.facts`); NULL where the caller named a model."""
    plan: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    """What a plan did for the answer, as JSON: `kind`, and counts by name; NULL: there was none."""


class AttemptRow(SQLModel, table=True):
    """One per upstream call, linked to its request."""

    __tablename__ = "attempt"

    id: str = Field(primary_key=True, max_length=48)
    request_id: str = Field(max_length=40, index=True)
    seq: int
    model: str = Field(max_length=128)
    provider: str = Field(max_length=128)
    started_at_ms: int = _big()
    first_byte_us: int | None = _big(nullable=True)
    duration_us: int = _big()
    outcome: str = Field(max_length=24)
    upstream_status: int | None = None
    error: str | None = Field(default=None, max_length=300)
    input_tokens: int = _big()
    cached_input_tokens: int = _big()
    cache_write_tokens: int = _big()
    output_tokens: int = _big()
    reasoning_tokens: int = _big()
    cost_nanousd: int | None = _big(nullable=True)
    cost_estimated: bool = False
    kind: str = Field(default="first", max_length=16, sa_column_kwargs={"server_default": "first"})
    """Why it was made: see `gateway.ledger.records.AttemptKind`."""


class OutcomeRow(SQLModel, table=True):
    """What one source said of one model's answer to a request."""

    __tablename__ = "outcome"

    request_id: str = Field(primary_key=True, max_length=40)
    source: str = Field(primary_key=True, max_length=64)
    """Who said it: `caller`, a name that the caller gives, or `judge`."""
    model: str = Field(primary_key=True, max_length=128)
    tenant: str = Field(max_length=64)
    key_id: str = Field(max_length=16)
    created_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False, index=True))
    score: float = Field(sa_column=Column(Double, nullable=False))
    """From 0, rejected, to 1, accepted."""
    comment: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    p_success: float | None = Field(default=None, sa_column=Column(Double, nullable=True))
    """What the decision had expected of this model; NULL: nothing."""
    probe_version: str | None = Field(default=None, max_length=128)


class SampleRow(SQLModel, table=True):
    """The prompt of a request, and answers to it, where the policy keeps them to learn from."""

    __tablename__ = "sample"

    request_id: str = Field(primary_key=True, max_length=40)
    created_at_ms: int = _big()
    prompt: str = Field(sa_column=Column(Text, nullable=False))
    """The conversation as JSON."""
    answers: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    """JSON: model → what it wrote."""


class BudgetRow(SQLModel, table=True):
    """One budget that several workers share. Its spend is the ledger's, booked in the transaction of each row."""

    __tablename__ = "budget"

    scope: str = Field(primary_key=True, max_length=300)
    window: str = Field(primary_key=True, max_length=8)
    started_ms: int = _big()
    spent_nanousd: int = _big()
    reserved_nanousd: int = _big()
    given_nanousd: int | None = _big(nullable=True)
    """What callers have given this run."""
    spare_nanousd: int = _later()
    """Of `reserved_nanousd`, what no request uses: the sum of the workers' `spare_nanousd`."""
    recalls: int = _later()
    """How often a worker has asked the others to give back what they do not use."""


class WorkerRow(SQLModel, table=True):
    """A worker that reserves from shared budgets, for as long as it lives."""

    __tablename__ = "worker"

    id: str = Field(primary_key=True, max_length=64)
    host: str = Field(max_length=255)
    pid: int
    heartbeat_ms: int = _big()
    """By the database's own clock."""
    recalls: int = _later()
    """How often another one wanted back what this one does not use, of any budget."""


class WorkerHoldRow(SQLModel, table=True):
    """What one worker holds of one shared budget: a part of the budget's `reserved_nanousd`."""

    __tablename__ = "worker_hold"

    worker: str = Field(primary_key=True, max_length=64)
    scope: str = Field(primary_key=True, max_length=300)
    window: str = Field(primary_key=True, max_length=8)
    amount_nanousd: int = _big()
    reclaimed_nanousd: int = _big()
    """Of a worker that died: counted as spent until its journal says what it did spend."""
    reclaimed_in_ms: int = _big()
    """Start of the window that counts it."""
    batch: int = _big()
    """The worker's last batch that changed this row."""
    spare_nanousd: int = _later()
    """Of `amount_nanousd`, what no request used when this was written: at least 1 while the worker keeps a slice."""


def insert_into(table: Any, dialect: str) -> Any:
    """`INSERT` as the database in use extends it (`ON CONFLICT`, `RETURNING`). What SQLAlchemy has for PostgreSQL is
    2 MB that a worker on SQLite does not load."""
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as on_postgresql

        return on_postgresql(table)
    from sqlalchemy.dialects.sqlite import insert as on_sqlite

    return on_sqlite(table)
