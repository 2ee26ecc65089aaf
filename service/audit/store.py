"""The tables of the audit, in SQLite or PostgreSQL; a store is used from one thread at a time."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, StatementError

from service.audit.postgres import days
from service.audit.rows import NAMES, Row, as_dict
from service.audit.schema import AuditError, is_newer, upgrade


class BadRow(Exception):
    """The store answers, but will never accept a row."""


class Utc(sa.TypeDecorator[datetime]):
    """A time in UTC; SQLite has no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Write every time as UTC."""
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Read every time as UTC."""
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


metadata = sa.MetaData()
inputs = sa.Table(  # in PostgreSQL, most rows are in a table of their day, see `postgres.days`
    "psim_audit",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("time", Utc, nullable=False, index=True),
    sa.Column("request_id", sa.Text, nullable=False, index=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("decision", sa.Text),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("detector", sa.Text),
    sa.Column("confidence", sa.Double),
    sa.Column("score", sa.Double),
    sa.Column("threshold", sa.Double),
    sa.Column("p_value", sa.Double),
    sa.Column("finding", sa.Text),
    sa.Column("override", sa.Double),
    sa.Column("override_threshold", sa.Double),
    sa.Column("override_p_value", sa.Double),
    sa.Column("poisoned", sa.Boolean),
    sa.Column("truncated", sa.Boolean),
    sa.Column("label", sa.Text),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("text", sa.Text),
    sa.Column("text_hmac", sa.Text, index=True),
    sa.Column("model", sa.Text),
    sa.Column("caller", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("sample_rate", sa.Double, nullable=False, server_default="1"),
    sa.Column("mark", sa.Text),
    sa.CheckConstraint("mark IN ('poisoned', 'false_alarm')", name="psim_audit_mark"),
)
flagged = sa.or_(inputs.c.poisoned == sa.true(), inputs.c.finding.is_not(None))
"""Whether something was found, in the form that lets SQLite use the index. While a deployment is
updated, older versions still write rows that are poisoned and have no finding."""
sa.Index("ix_psim_audit_flagged", inputs.c.time, sqlite_where=flagged, postgresql_where=flagged)
marks = sa.Table(  # history of marks; the current ones are in `inputs`
    "psim_audit_marks",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("input", sa.ForeignKey(inputs.c.id, ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("time", Utc, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("mark", sa.Text),
)
exceptions = sa.Table(
    "psim_audit_exceptions",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("text_hmac", sa.Text, nullable=False),
    sa.Column("created", Utc, nullable=False),
    sa.Column("expires", Utc, nullable=False, index=True),
    sa.Column("reviewer", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("removed", Utc),
    sa.Column("removed_by", sa.Text),
)
pushes = sa.Table(  # findings that a receiver has not taken yet
    "psim_audit_pushes",
    metadata,
    sa.Column("input", sa.ForeignKey(inputs.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("time", Utc, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due", Utc, nullable=False, index=True),
)
leases = sa.Table(  # of what one process does at a time
    "psim_audit_leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("until", Utc, nullable=False),
)


class AuditStore:
    """Reads and writes the tables; opens nothing until it is used.

    Args:
        url: of the database.
        read_only: whether it is only read.
        push: whether rows with a finding are queued to be pushed, in the same transaction.

    Raises:
        AuditError: the URL cannot be used.
    """

    def __init__(self, url: str, read_only: bool = False, push: bool = False) -> None:
        parsed = _parse(url)
        self._file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
        if self._file and read_only:
            if not self._file.is_file():
                raise AuditError(f"{self._file}: there is no such audit")
            query = {"mode": "ro", "uri": "true"}
            parsed = parsed.set(database=self._file.absolute().as_uri(), query=query)
        self._engine = _engine(parsed)
        self._push = push
        insert = sqlite.insert if self._file else postgresql.insert
        self._insert = insert(inputs).on_conflict_do_nothing(index_elements=["id"])
        self._queue = insert(pushes).on_conflict_do_nothing(index_elements=["input"])
        self._lease = insert(leases).on_conflict_do_nothing(index_elements=["name"])
        if self._file:
            _prepare_sqlite(self._engine, read_only)

    def migrate(self) -> None:
        """Upgrade the tables to the schema of this version, or take a newer one that has all of it.

        Raises:
            NewerSchemaError: a newer version removed what this one needs.
        """
        if self._file:
            self._file.touch(mode=0o600)  # it may hold texts
        with self._engine.begin() as connection:
            upgrade(connection, metadata)

    @contextmanager
    def connect(self, seconds: float) -> Iterator[sa.Connection]:
        """Begin a transaction with a time limit; in PostgreSQL, it is one for each statement.

        Raises:
            AuditError: the audit cannot be used, or not in time.
        """
        try:
            with self._engine.begin() as connection:
                _limit_time(connection, seconds)
                yield connection
        except DBAPIError as error:
            raise AuditError(f"the audit cannot be used: {error.orig}") from None

    def insert(self, rows: Sequence[Row]) -> None:
        """Write all rows or none; rows that exist stay as they are.

        Raises:
            BadRow: a row will never be accepted.
        """
        if not rows:
            return
        try:
            with self._engine.begin() as connection:
                self._write(connection, [_storable(row) for row in rows])
                found = [row for row in rows if row.finding] if self._push else []
                if found:
                    connection.execute(self._queue, [_pushed(row) for row in found])
        except (DataError, IntegrityError, UnicodeError) as error:
            raise BadRow(type(error).__name__) from None
        except StatementError as error:
            if isinstance(error, DBAPIError):
                raise
            raise BadRow(type(error).__name__) from None

    def _write(self, connection: sa.Connection, rows: Sequence[Mapping[str, object]]) -> None:
        if self._file:
            connection.execute(self._insert, rows)
        else:
            days.write(connection, rows)

    def take_lease(
        self, connection: sa.Connection, name: str, owner: str, now: datetime, seconds: float
    ) -> bool:
        """Take or prolong a lease; return False if another owner has it."""
        until = now + timedelta(seconds=seconds)
        free = sa.or_(leases.c.owner == owner, leases.c.until <= now)
        taken = sa.update(leases).where(leases.c.name == name, free)
        if connection.execute(taken.values(owner=owner, until=until)).rowcount:
            return True
        first = self._lease.values(name=name, owner=owner, until=until)
        return connection.execute(first).rowcount == 1

    def purge(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` rows that are older than a time; return how many.

        In PostgreSQL, drop the days that had ended then, and make the table of tomorrow.
        """
        if self._file is None:
            days.drop(self._engine, before)
            with self._engine.begin() as connection:
                days.make(connection, days.day_of(datetime.now(UTC) + timedelta(days=1)))
                return days.delete(connection, before, limit)
        old = sa.select(inputs.c.id).where(inputs.c.time < before).limit(limit)
        with self._engine.begin() as connection:
            return connection.execute(sa.delete(inputs).where(inputs.c.id.in_(old))).rowcount

    def read(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        decisions: Sequence[str] = (),
        request_id: str | None = None,
        marks: Sequence[str] = (),
        model: str | None = None,
        findings: Sequence[str] = (),
    ) -> Iterator[Row]:
        """Yield rows in order of time, from `since` to before `until`.

        Raises:
            AuditError: there is no audit, or this version cannot read it.
        """
        query = sa.select(*(inputs.c[name] for name in NAMES))
        query = query.order_by(inputs.c.time, inputs.c.request_id, inputs.c.number)
        if since is not None:
            query = query.where(inputs.c.time >= since)
        if until is not None:
            query = query.where(inputs.c.time < until)
        if decisions:
            query = query.where(inputs.c.decision.in_(decisions))
        if request_id is not None:
            query = query.where(inputs.c.request_id == request_id)
        if model is not None:
            query = query.where(inputs.c.model == model)
        if marks:
            query = query.where(inputs.c.mark.in_(marks))
        if findings:
            query = query.where(inputs.c.finding.in_(findings))
        try:
            with self._engine.connect() as connection:
                is_newer(connection, metadata)  # says better than the database what is missing
                for row in connection.execution_options(yield_per=1000).execute(query):
                    yield Row(**row._mapping)
        except DBAPIError as error:
            raise AuditError(f"the audit cannot be read: {error.orig}") from None

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        self._engine.dispose()


def _pushed(row: Row) -> dict[str, object]:
    return {"input": row.id, "time": row.time, "attempts": 0, "due": row.time}


def _storable(row: Row) -> dict[str, object]:
    """Return a row by column; neither NUL nor half a surrogate pair can be stored everywhere."""
    return {
        name: value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        if isinstance(value, str)
        else value
        for name, value in as_dict(row).items()
    }


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:  # its message may hold a password
        raise AuditError("the URL of the audit cannot be parsed") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        supported = "sqlite:////folder/file or postgresql://user@host/database"
        raise AuditError(f"{parsed.drivername} is no store for an audit; use {supported}")
    if parsed.database in (None, "", ":memory:"):
        raise AuditError("the URL of the audit names no file or database")
    return parsed


def _engine(url: sa.URL) -> sa.Engine:
    options: dict[str, Any] = {"poolclass": sa.NullPool}  # a file that was removed is created again
    if url.get_backend_name() == "postgresql":
        # A host that has vanished is noticed within a minute.
        keepalive = {"keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3}
        timeouts = {"connect_timeout": 5, "tcp_user_timeout": 30_000}
        options = {"pool_size": 1, "pool_pre_ping": True, "connect_args": keepalive | timeouts}
    try:
        return sa.create_engine(url, hide_parameters=True, **options)
    except ModuleNotFoundError as error:
        raise AuditError(
            f"PostgreSQL needs {error.name}: pip install 'psim-gateway[postgres]'"
        ) from error


def _prepare_sqlite(engine: sa.Engine, read_only: bool) -> None:
    def on_connect(connection: Any, record: object) -> None:
        # `on_begin` starts transactions: those of Python's driver leave out changes of tables.
        connection.isolation_level = None
        if not read_only:  # readers then do not block the service's writes
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA foreign_keys=ON")

    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)


def _limit_time(connection: sa.Connection, seconds: float) -> None:
    if connection.dialect.name == "postgresql":
        limit = sa.func.set_config("statement_timeout", f"{seconds * 1000:.0f}", True)
        connection.execute(sa.select(limit))
        return
    deadline = time.monotonic() + seconds
    driver: Any = connection.connection.dbapi_connection
    driver.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
