"""Budgets that several workers share; paths of agent runs, wide enough for a tree and ordered byte by byte."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def _counts(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def upgrade() -> None:
    run = sa.String(200, collation="C") if op.get_bind().dialect.name == "postgresql" else sa.String(200)
    with op.batch_alter_table("request") as request:
        request.alter_column("scope", type_=run, existing_type=sa.String(64), existing_nullable=True)
        request.create_index("request_by_run", ["key_id", "scope"])
    op.create_table(
        "budget",
        sa.Column("scope", sa.String(300), primary_key=True),
        sa.Column("window", sa.String(8), primary_key=True),
        *_counts("started_ms", "spent_nanousd", "reserved_nanousd"),
        sa.Column("given_nanousd", sa.BigInteger),
    )
    op.create_table(
        "worker",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        *_counts("heartbeat_ms"),
    )
    op.create_table(
        "worker_hold",
        sa.Column("worker", sa.String(64), primary_key=True),
        sa.Column("scope", sa.String(300), primary_key=True),
        sa.Column("window", sa.String(8), primary_key=True),
        *_counts("amount_nanousd", "reclaimed_nanousd", "reclaimed_in_ms", "batch"),
    )
