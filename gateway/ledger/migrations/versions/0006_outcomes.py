"""What callers and judges said of answers; what is kept to learn from; which request a shadow is of."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "outcome",
        sa.Column("request_id", sa.String(40), primary_key=True),
        sa.Column("source", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("p_success", sa.Double),
        sa.Column("probe_version", sa.String(128)),
    )
    op.create_index("ix_outcome_created_at_ms", "outcome", ["created_at_ms"])
    op.create_table(
        "sample",
        sa.Column("request_id", sa.String(40), primary_key=True),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answers", sa.Text),
    )
    op.add_column("request", sa.Column("parent", sa.String(40)))
    op.add_column("request", sa.Column("prompt_hash", sa.String(32)))
    op.add_column("request", sa.Column("facts", sa.Text))
