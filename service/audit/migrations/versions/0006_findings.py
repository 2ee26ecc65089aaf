"""Keep what was found in an input, and what the override test said."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

INPUTS, INDEX = "psim_audit", "ix_psim_audit_flagged"
POISONED = sa.column("poisoned", sa.Boolean) == sa.true()
FOUND = sa.or_(POISONED, sa.column("finding", sa.Text).is_not(None))


def upgrade() -> None:
    """Add the columns; what older versions called poisoned was rejected, as `triggered` is."""
    op.add_column(INPUTS, sa.Column("finding", sa.Text))
    for name in ("override", "override_threshold", "override_p_value"):
        op.add_column(INPUTS, sa.Column(name, sa.Double))
    table = sa.table(INPUTS, sa.column("finding", sa.Text), sa.column("poisoned", sa.Boolean))
    op.execute(sa.update(table).where(table.c.poisoned == sa.true()).values(finding="triggered"))
    op.drop_index(INDEX, INPUTS)
    op.create_index(INDEX, INPUTS, ["time"], sqlite_where=FOUND, postgresql_where=FOUND)


def downgrade() -> None:
    """Drop the columns."""
    op.drop_index(INDEX, INPUTS)
    op.create_index(INDEX, INPUTS, ["time"], sqlite_where=POISONED, postgresql_where=POISONED)
    for name in ("finding", "override", "override_threshold", "override_p_value"):
        op.drop_column(INPUTS, name)
