"""The column `voice` is called `detector`, as everywhere else."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Rename the column; its values stay."""
    with op.batch_alter_table("psim_audit") as table:
        table.alter_column("voice", new_column_name="detector")


def downgrade() -> None:
    """Give the column its old name."""
    with op.batch_alter_table("psim_audit") as table:
        table.alter_column("detector", new_column_name="voice")
