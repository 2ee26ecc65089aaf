"""With which API key an input came."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; nothing is known of what was audited before."""
    op.add_column("psim_audit", sa.Column("caller", sa.Text))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("psim_audit", "caller")
