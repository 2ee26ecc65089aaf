"""Keep at what rate the inputs were sampled that a row stands for."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column; rows of older versions are not sampled, those that still come in too."""
    rate = sa.Column("sample_rate", sa.Double, nullable=False, server_default="1")
    op.add_column("psim_audit", rate)


def downgrade() -> None:
    """Drop the column; figures then count rows as inputs."""
    op.drop_column("psim_audit", "sample_rate")
