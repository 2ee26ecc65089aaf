"""Keep reviewed exceptions, and which decisions they made."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

INPUTS, EXCEPTIONS = "psim_audit", "psim_audit_exceptions"


def upgrade() -> None:
    """Create the table and the column."""
    op.add_column(INPUTS, sa.Column("reason", sa.Text))
    time = sa.DateTime(timezone=True)
    op.create_table(
        EXCEPTIONS,
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("text_hmac", sa.Text, nullable=False),
        sa.Column("created", time, nullable=False),
        sa.Column("expires", time, nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("removed", time),
        sa.Column("removed_by", sa.Text),
    )
    op.create_index("ix_psim_audit_exceptions_expires", EXCEPTIONS, ["expires"])


def downgrade() -> None:
    """Drop both."""
    op.drop_table(EXCEPTIONS)
    op.drop_column(INPUTS, "reason")
