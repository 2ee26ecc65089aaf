"""Queue findings that are to be pushed, and let one process at a time push them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

PUSHES, LEASES = "psim_audit_pushes", "psim_audit_leases"


def upgrade() -> None:
    """Create the tables."""
    time = sa.DateTime(timezone=True)
    op.create_table(
        PUSHES,
        sa.Column(
            "input", sa.Uuid, sa.ForeignKey("psim_audit.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("time", time, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due", time, nullable=False),
    )
    op.create_index("ix_psim_audit_pushes_due", PUSHES, ["due"])
    op.create_table(
        LEASES,
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("until", time, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table(LEASES)
    op.drop_table(PUSHES)
