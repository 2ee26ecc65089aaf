"""Keep the name of the API key that an input came with."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; it is NULL in older rows."""
    op.add_column("psim_audit", sa.Column("caller", sa.Text))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("psim_audit", "caller")
