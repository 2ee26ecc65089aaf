"""Reviewed exceptions: exact texts in which a bundle finds something, and which may pass.

A text is known by its HMAC, so an exception holds no text and never fits a part of one. It belongs
to the bundle whose finding was reviewed, and ends by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from uuid import UUID, uuid4

import sqlalchemy as sa

from service.audit.schema import AuditError
from service.audit.store import exceptions as table

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
