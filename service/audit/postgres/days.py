"""A table for each day: retention drops tables, since deleting rows takes long and frees nothing.

The tables inherit from `psim_audit`: whoever reads, marks or deletes there reaches the rows of all
days. An older version does so too, and goes on writing to `psim_audit` itself. Partitions that are
declared as such would not allow that: their primary key has to hold the time, so `ON CONFLICT (id)`
of the older version would fail. Rows of a day without a partition would be refused, or be in a
default partition, which is locked and scanned whenever another one is made.

No foreign key can refer to several tables, so marks and pushes are deleted here with their inputs.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from service.audit.rows import NAMES

log = logging.getLogger(__name__)

LOCK = 0x50534441
"""Arbitrary id of the lock under which one process at a time makes or drops tables."""
LOCK_NOT_AVAILABLE = "55P03"
DROP_WAIT_S = 2
"""Time that a drop waits for those who read the table; whoever comes later waits behind it."""
_NAME = re.compile(r"psim_audit_\d{8}")
_DAY = timedelta(days=1)


def day_of(time: datetime) -> date:
    """Return the day in UTC, whose table a row of this time belongs to."""
    return time.astimezone(UTC).date()


def table_of(day: date) -> str:
    """Return the name of a day's table."""
    return f"psim_audit_{day:%Y%m%d}"


def make(connection: sa.Connection, day: date) -> None:
    """Make the table of a day if there is none."""
    name = table_of(day)
    if connection.execute(sa.select(sa.func.to_regclass(name))).scalar():
        return
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    start, end = (f"{one.isoformat()} 00:00+00" for one in (day, day + _DAY))
    for statement in (
        # The check lets the database leave out the days that a query does not ask for.
        f"CREATE TABLE IF NOT EXISTS {name} (PRIMARY KEY (id), "
        f"CHECK (time >= '{start}' AND time < '{end}')) INHERITS (psim_audit)",
        f"CREATE INDEX IF NOT EXISTS {name}_time ON {name} (time)",
        f"CREATE INDEX IF NOT EXISTS {name}_request_id ON {name} (request_id)",
        f"CREATE INDEX IF NOT EXISTS {name}_text_hmac ON {name} (text_hmac)",
        f"CREATE INDEX IF NOT EXISTS {name}_flagged ON {name} (time) "
        "WHERE poisoned OR finding IS NOT NULL",
    ):
        connection.execute(sa.text(statement))


def write(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to the tables of their days; rows that exist stay as they are."""
    by_day: defaultdict[date, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_day[day_of(row["time"])].append(row)
    for day in by_day:  # before any row is locked: whoever drops a table waits for those
        make(connection, day)
    driver: Any = connection.dialect.dbapi
    for day, theirs in by_day.items():
        attempt = connection.begin_nested()
        try:
            _copy(connection, day, theirs)
        except (driver.IntegrityError, driver.DataError):  # one is there already, or is bad
            attempt.rollback()
            insert(connection, day, theirs)
        else:
            attempt.commit()


def _copy(connection: sa.Connection, day: date, rows: Iterable[Mapping[str, Any]]) -> None:
    copy = f"COPY {table_of(day)} ({', '.join(NAMES)}) FROM STDIN"
    session: Any = connection.connection.dbapi_connection
    with session.cursor() as cursor, cursor.copy(copy) as out:
        for row in rows:
            out.write_row([row[name] for name in NAMES])


def insert(connection: sa.Connection, day: date, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of one day that are not there yet, one by one, which is slower."""
    values = ", ".join(f":{name}" for name in NAMES)
    into = f"INSERT INTO {table_of(day)} ({', '.join(NAMES)}) VALUES ({values})"
    connection.execute(sa.text(f"{into} ON CONFLICT (id) DO NOTHING"), rows)


def drop(engine: sa.Engine, before: datetime) -> None:
    """Drop the tables of all days that had ended at a time, with their marks and pushes.

    A table that somebody reads for longer than `DROP_WAIT_S` stays until the next call, with both.
    """
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"SET LOCAL lock_timeout = '{DROP_WAIT_S}s'"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            for name in _ended(connection, before):
                for other in ("psim_audit_marks", "psim_audit_pushes"):
                    theirs = f"DELETE FROM {other} USING {name} WHERE {other}.input = {name}.id"
                    connection.execute(sa.text(theirs))
                connection.execute(sa.text(f"DROP TABLE {name}"))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        log.warning("days that are too old are still being read; they are dropped in an hour")


def delete(connection: sa.Connection, before: datetime, limit: int) -> int:
    """Delete at most `limit` old rows that are in the table of no day; return how many.

    They are those of versions that knew no days.
    """
    return int(connection.execute(_DELETE, {"before": before, "limit": limit}).scalar_one())


def names(connection: sa.Connection) -> list[str]:
    """Return the names of the tables of all days, the oldest first."""
    found = connection.execute(_CHILDREN).scalars()
    return sorted(name for name in found if _NAME.fullmatch(name))


def _ended(connection: sa.Connection, before: datetime) -> list[str]:
    return [name for name in names(connection) if name < table_of(day_of(before))]


_CHILDREN = sa.text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
    "WHERE inhparent = 'psim_audit'::regclass"
)
_DELETE = sa.text(
    "WITH old AS (DELETE FROM ONLY psim_audit WHERE id IN "
    "(SELECT id FROM ONLY psim_audit WHERE time < :before LIMIT :limit) RETURNING id), "
    "m AS (DELETE FROM psim_audit_marks WHERE input IN (SELECT id FROM old)), "
    "p AS (DELETE FROM psim_audit_pushes WHERE input IN (SELECT id FROM old)) "
    "SELECT count(*) FROM old"
)
