"""What a plan did for a request's answer."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("request", sa.Column("plan", sa.Text))
