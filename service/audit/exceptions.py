"""Reviewed exceptions: exact texts in which a bundle finds something, and which may pass.

A text is known by its HMAC, so an exception holds no text and never fits a part of one. It belongs
to the bundle whose finding was reviewed, and ends by itself.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import sqlalchemy as sa

from service.audit.rows import hmac_of
from service.audit.schema import AuditError
from service.audit.store import AuditStore
from service.audit.store import exceptions as table
from service.observability.metrics import AuditMetrics

log = logging.getLogger(__name__)

READ_EVERY_S = 2.0
"""Time after which every replica knows of a change."""
STALE_S = 60.0
"""Time without an answer of the store after which no exception counts: one may be removed."""
READ_S = 5.0
MAX_DAYS = 365
NOTE_CHARS = 500

Known = Mapping[tuple[str, str], datetime]
"""End of each exception, by the bundle's digest and the text's HMAC."""


@dataclass(frozen=True, slots=True)
class ReviewedException:
    """A decision of a reviewer that a text may pass."""

    digest: str
    """Digest of the bundle."""
    text_hmac: str
    created: datetime
    expires: datetime
    reviewer: str
    note: str
    removed: datetime | None = None
    removed_by: str | None = None
    id: UUID = field(default_factory=uuid4)

    def holds(self, now: datetime) -> bool:
        """Return whether it counts at a time."""
        return self.removed is None and now < self.expires


def add(connection: sa.Connection, new: ReviewedException) -> None:
    """Keep a new exception.

    Raises:
        AuditError: there is one for this text and bundle already.
    """
    same = (table.c.digest == new.digest, table.c.text_hmac == new.text_hmac)
    if other := connection.execute(_IDS.where(*same, *_in_force(new.created))).first():
        raise AuditError(f"there is an exception for this text already, remove {other.id} first")
    connection.execute(sa.insert(table).values(**asdict(new)))


def remove(connection: sa.Connection, id: UUID, who: str, now: datetime) -> None:
    """End an exception; it stays on record.

    Raises:
        AuditError: none with this id is in force.
    """
    ended = sa.update(table).where(table.c.id == id, *_in_force(now))
    if not connection.execute(ended.values(removed=now, removed_by=who)).rowcount:
        raise AuditError(f"no exception {id} is in force")


def recorded(connection: sa.Connection) -> list[ReviewedException]:
    """Return all exceptions, those that have ended too, newest first."""
    rows = connection.execute(sa.select(table).order_by(table.c.created.desc(), table.c.id))
    return [ReviewedException(**row._mapping) for row in rows]


def in_force(connection: sa.Connection, now: datetime) -> Known:
    """Return the exceptions that count at a time."""
    query = sa.select(table.c.digest, table.c.text_hmac, table.c.expires)
    rows = connection.execute(query.where(*_in_force(now)))
    return {(row.digest, row.text_hmac): row.expires for row in rows}


_IDS = sa.select(table.c.id)


def _in_force(now: datetime) -> Sequence[sa.ColumnElement[bool]]:
    return table.c.removed.is_(None), table.c.expires > now


class Exceptions:
    """The exceptions in force, read again and again in a thread of its own.

    Args:
        url: of the audit.
        key: of the HMAC of texts.
        metrics: tell how many are in force, and whether they are too old to count.
    """

    def __init__(self, url: str, key: bytes, metrics: AuditMetrics) -> None:
        self._url, self._key, self._metrics = url, key, metrics
        self._known: Known = {}
        self._read_at = -STALE_S
        self._migrated = False
        self._failing: str | None = None
        """What was logged of the failure that lasts."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="exceptions", daemon=True)
        metrics.exceptions.set_function(lambda: 0 if self.stale else len(self._known))
        metrics.exceptions_stale.set_function(lambda: self.stale)

    @property
    def stale(self) -> bool:
        """Whether they were not read for so long that none of them counts."""
        return time.monotonic() - self._read_at > STALE_S

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(READ_S)

    def covers(self, digest: str, text: str) -> bool:
        """Return whether an exception for exactly this text is in force for a bundle."""
        if not self._known or self.stale:
            return False
        try:
            expires = self._known.get((digest, hmac_of(self._key, text)))
        except UnicodeEncodeError:
            return False
        return expires is not None and datetime.now(UTC) < expires

    # Everything below runs in the thread.

    def _work(self) -> None:
        store = AuditStore(self._url)
        with closing(store):
            while not self._closing.is_set():
                try:
                    self._read(store)
                except Exception as error:  # whatever a database driver raises
                    self._fail(store, error)
                self._closing.wait(READ_EVERY_S)

    def _read(self, store: AuditStore) -> None:
        if not self._migrated:
            store.migrate()
            self._migrated = True
        with store.connect(READ_S) as connection:
            self._known = in_force(connection, datetime.now(UTC))
        self._read_at, self._failing = time.monotonic(), None

    def _fail(self, store: AuditStore, error: Exception) -> None:
        self._metrics.audit_failures.inc()
        self._migrated = False
        store.close()
        reason = str(error) if isinstance(error, AuditError) else type(error).__name__
        if reason != self._failing:
            log.error("the exceptions cannot be read", extra={"error": reason})
        self._failing = reason
