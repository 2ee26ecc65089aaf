"""The version of the audit's schema: raised to this program's, or taken as it is if it is newer.

While a deployment is updated or rolled back, two versions use one database. So a version first
only adds to the schema (expands it), which the version before can ignore; what nothing needs any
more goes in a later version (contracts it).
"""

import logging
from collections.abc import Iterator
from importlib.metadata import version

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from models.errors import PsimError

log = logging.getLogger(__name__)

VERSION_TABLE = "psim_audit_version"
"""The database may hold other applications' tables, and versions of theirs."""
LOCK = 0x5053494D
"""Arbitrary id of the lock by which replicas that start together migrate one after the other."""


class AuditError(PsimError):
    """The audit cannot be opened or read."""


class NewerSchemaError(AuditError):
    """A newer version wrote the audit, and its schema lacks what this one needs."""


def migrations(connection: sa.Connection) -> Config:
    """Return what alembic needs to migrate over a connection."""
    config = Config()
    config.set_main_option("script_location", "service.audit:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: sa.Connection, needed: sa.MetaData) -> None:
    """Raise the schema to that of this version, unless it is newer and has all that is needed.

    Args:
        connection: within a transaction, at whose end the lock of PostgreSQL is released.
        needed: the tables that this version reads and writes.

    Raises:
        NewerSchemaError: it is newer and lacks something.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    if is_newer(connection, needed):
        log.info("the audit has the schema of a newer version; this one uses its part of it")
    else:
        command.upgrade(migrations(connection), "head")


def is_newer(connection: sa.Connection, needed: sa.MetaData) -> bool:
    """Return whether a newer version made the schema, which has all that this version needs.

    Raises:
        NewerSchemaError: it is newer and lacks something.
    """
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision()
    scripts = ScriptDirectory.from_config(migrations(connection))
    if found is None or found in {script.revision for script in scripts.walk_revisions()}:
        return False
    if lacks := list(obstacles(connection, needed)):
        raise NewerSchemaError(
            f"the audit has schema {found} of a newer version, which psim-gateway "
            f"{version('psim-gateway')} with schema {scripts.get_current_head()} cannot use: "
            f"{'; '.join(lacks)}. Run the newer version, or name another database in "
            "PSIM_AUDIT_URL (docs/upgrading.md)"
        )
    return True


def obstacles(connection: sa.Connection, needed: sa.MetaData) -> Iterator[str]:
    """Yield what keeps a version that needs these tables from using those of a database."""
    inspector = sa.inspect(connection)
    for table in needed.sorted_tables:
        if not inspector.has_table(table.name):
            yield f"the table {table.name} is gone"
            continue
        columns = {column["name"]: column for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in columns:
                yield f"the column {table.name}.{column.name} is gone"
            elif not columns.pop(column.name)["nullable"] and column.nullable:
                yield f"the column {table.name}.{column.name} may no longer be empty"
        for name, found in columns.items():
            if not found["nullable"] and found["default"] is None:
                yield f"the new column {table.name}.{name} may not be empty"
