"""For which model an input was."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; nothing is known of what was audited before."""
    op.add_column("psim_audit", sa.Column("model", sa.Text))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("psim_audit", "model")
