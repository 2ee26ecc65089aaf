"""Create the table of audited inputs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "psim_audit",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("decision", sa.Text),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("voice", sa.Text),
        sa.Column("confidence", sa.Double),
        sa.Column("score", sa.Double),
        sa.Column("threshold", sa.Double),
        sa.Column("p_value", sa.Double),
        sa.Column("poisoned", sa.Boolean),
        sa.Column("truncated", sa.Boolean),
        sa.Column("label", sa.Text),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("text_hmac", sa.Text),
        sa.Column("mark", sa.Text),
        sa.CheckConstraint("mark IN ('poisoned', 'false_alarm')", name="psim_audit_mark"),
    )
    for column in ("time", "request_id", "text_hmac"):
        op.create_index(f"ix_psim_audit_{column}", "psim_audit", [column])


def downgrade() -> None:
    """Drop the table and all that was audited."""
    op.drop_table("psim_audit")
