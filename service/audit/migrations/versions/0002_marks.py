"""Keep who marked which input; index the inputs that were found poisoned."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table and the index."""
    op.create_table(
        "psim_audit_marks",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column(
            "input", sa.Uuid, sa.ForeignKey("psim_audit.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("mark", sa.Text),
    )
    op.create_index("ix_psim_audit_marks_input", "psim_audit_marks", ["input"])
    flagged = sa.column("poisoned", sa.Boolean) == sa.true()
    op.create_index(
        "ix_psim_audit_flagged",
        "psim_audit",
        ["time"],
        sqlite_where=flagged,
        postgresql_where=flagged,
    )


def downgrade() -> None:
    """Drop both."""
    op.drop_index("ix_psim_audit_flagged", "psim_audit")
    op.drop_table("psim_audit_marks")
