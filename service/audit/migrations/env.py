"""Entry point of alembic; `service.audit.store` passes the connection."""

import sqlalchemy as sa
from alembic import context

from service.audit.store import metadata

LOCK = 0x5053494D
"""Arbitrary id of the lock by which replicas that start together migrate one after the other."""

connection: sa.Connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
# The database may hold other applications' tables, and versions of theirs.
context.configure(
    connection=connection, target_metadata=metadata, version_table="psim_audit_version"
)
with context.begin_transaction():
    context.run_migrations()
