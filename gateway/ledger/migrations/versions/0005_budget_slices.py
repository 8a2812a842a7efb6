"""What workers hold of a shared budget beyond their requests, and how others ask for it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_COLUMNS = (("budget", "spare_nanousd"), ("budget", "recalls"), ("worker", "recalls"), ("worker_hold", "spare_nanousd"))


def upgrade() -> None:
    for table, name in _COLUMNS:
        op.add_column(table, sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
