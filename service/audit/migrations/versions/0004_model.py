"""Keep the model that an input was for."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; it is NULL in older rows."""
    op.add_column("psim_audit", sa.Column("model", sa.Text))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("psim_audit", "model")
