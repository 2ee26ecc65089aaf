"""In PostgreSQL, let rows live in tables by day, which inherit from that of all inputs.

Nothing is moved: rows that are there stay where they are until they are too old. Foreign keys do
not see tables that inherit, so those of marks and pushes go; `service.audit.postgres.days` deletes
both with their inputs.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

INPUTS = "psim_audit"
OTHERS = ("psim_audit_marks", "psim_audit_pushes")


def upgrade() -> None:
    """Drop the foreign keys; whoever writes makes the tables."""
    if op.get_bind().dialect.name == "postgresql":
        for other in OTHERS:
            op.drop_constraint(f"{other}_input_fkey", other, type_="foreignkey")


def downgrade() -> None:
    """Move all rows into one table, and restore the foreign keys."""
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        return
    columns = ", ".join(column["name"] for column in sa.inspect(connection).get_columns(INPUTS))
    for day in connection.execute(sa.text(_DAYS)).scalars().all():
        op.execute(f"INSERT INTO {INPUTS} ({columns}) SELECT {columns} FROM {day}")
        op.execute(f"DROP TABLE {day}")
    for other in OTHERS:
        op.execute(f"DELETE FROM {other} WHERE input NOT IN (SELECT id FROM {INPUTS})")
        op.create_foreign_key(
            f"{other}_input_fkey", other, INPUTS, ["input"], ["id"], ondelete="CASCADE"
        )


_DAYS = f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{INPUTS}'::regclass"
