"""Rename the column `voice` to `detector`, as it is called everywhere else."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Rename the column; its values stay."""
    # Not by a batch operation: on SQLite it replaces the table, and dropping the old one deletes
    # the marks that refer to it.
    op.execute("ALTER TABLE psim_audit RENAME COLUMN voice TO detector")


def downgrade() -> None:
    """Restore the old name."""
    op.execute("ALTER TABLE psim_audit RENAME COLUMN detector TO voice")
