"""Teams, what a request was degraded for, its idempotency key and trace; why an attempt was made; who made a key."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("api_key", sa.Column("team", sa.String(64)))
    op.add_column("api_key", sa.Column("created_by", sa.String(64)))
    op.add_column("request", sa.Column("team", sa.String(64)))
    op.add_column("request", sa.Column("degraded", sa.String(128)))
    op.add_column("request", sa.Column("idempotency_key", sa.String(255)))
    op.add_column("request", sa.Column("trace_id", sa.String(32)))
    op.add_column("attempt", sa.Column("kind", sa.String(16), nullable=False, server_default="first"))
