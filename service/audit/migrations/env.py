"""Entry point of alembic; `service.audit.schema` passes the connection."""

import sqlalchemy as sa
from alembic import context

from service.audit.schema import VERSION_TABLE
from service.audit.store import metadata

connection: sa.Connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
