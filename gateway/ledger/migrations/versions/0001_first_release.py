"""The first release, whose tables were made without migrations: makes what is missing, and leaves what is there."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_metadata = sa.MetaData()


def _counts(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


_TOKENS = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")

sa.Table(
    "api_key",
    _metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_at_ms", sa.BigInteger),
    sa.Column("budget_nanousd", sa.BigInteger),
    sa.Column("budget_window", sa.String(8)),
)
sa.Table(
    "request",
    _metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(16), nullable=False),
    sa.Column("endpoint", sa.String(32), nullable=False),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("session", sa.String(128)),
    sa.Column("scope", sa.String(64)),
    sa.Column("model_requested", sa.String(256), nullable=False),
    sa.Column("model_served", sa.String(128)),
    sa.Column("provider", sa.String(128)),
    sa.Column("route", sa.String(128), nullable=False),
    sa.Column("policy_version", sa.String(64), nullable=False),
    sa.Column("decision", sa.Text),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("http_status", sa.Integer, nullable=False),
    sa.Column("error_code", sa.String(64)),
    sa.Column("cache", sa.String(8), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    *_counts(*_TOKENS),
    sa.Column("cost_nanousd", sa.BigInteger),
    sa.Column("cost_estimated", sa.Boolean, nullable=False),
    sa.Column("baseline_nanousd", sa.BigInteger),
    *_counts("reserved_nanousd"),
    sa.Column("first_byte_us", sa.BigInteger),
    *_counts("duration_us", "overhead_us"),
    sa.Index("request_by_key_time", "key_id", "created_at_ms"),
)
sa.Table(
    "attempt",
    _metadata,
    sa.Column("id", sa.String(48), primary_key=True),
    sa.Column("request_id", sa.String(40), nullable=False, index=True),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("provider", sa.String(128), nullable=False),
    *_counts("started_at_ms"),
    sa.Column("first_byte_us", sa.BigInteger),
    *_counts("duration_us"),
    sa.Column("outcome", sa.String(24), nullable=False),
    sa.Column("upstream_status", sa.Integer),
    sa.Column("error", sa.String(300)),
    *_counts(*_TOKENS),
    sa.Column("cost_nanousd", sa.BigInteger),
    sa.Column("cost_estimated", sa.Boolean, nullable=False),
)


def upgrade() -> None:
    connection = op.get_bind()
    _metadata.create_all(connection)
    for table in _metadata.tables.values():
        for index in table.indexes:
            index.create(connection, checkfirst=True)
