"""Inputs that were found poisoned, for a person to say whether they were."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from service.audit.rows import NAMES, Mark, Row
from service.audit.statistics import StatisticsFilter
from service.audit.store import flagged, inputs, marks

PAGE = 25
UNMARKED = "none"
CHARS = 1000
"""Of a text; it may be much longer."""
MOST = 1000
"""Up to which inputs are counted."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A mark that was set, or taken back if it is None."""

    mark: Mark | None
    who: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Found:
    """An input that was found poisoned, with the beginning of its text if that is kept."""

    row: Row
    chars: int | None
    """Of the whole text."""
    marked: Marked | None
    """The latest of its marks; None if it never had one."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which inputs are asked for."""

    scope: StatisticsFilter
    mark: str | None = None
    """One of `Mark`, or `UNMARKED`."""
    decision: str | None = None
    request_id: str | None = None

    @property
    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """What SQL has to ask for."""
        found = [flagged, *self.scope.conditions]
        for name in ("mark", "decision", "request_id"):
            value = getattr(self, name)
            if value is not None:
                wanted = None if value == UNMARKED else value
                found.append(inputs.c[name].is_not_distinct_from(wanted))
        return found


@dataclass(frozen=True, slots=True)
class Page:
    """Some inputs, the newest first."""

    found: Sequence[Found]
    more: bool
    """Whether there are older ones."""
    count: int
    """Of all pages; `MOST` is that many or more."""


def page(
    connection: sa.Connection, asked: Filter, before: tuple[datetime, UUID] | None = None
) -> Page:
    """Return the newest inputs, or those that come behind an input with this time and id."""
    query = _FOUND.where(*asked.conditions)
    if before:
        time, id = before
        same = sa.and_(inputs.c.time == time, inputs.c.id < id)
        query = query.where(inputs.c.time <= time, sa.or_(inputs.c.time < time, same))
    query = query.order_by(inputs.c.time.desc(), inputs.c.id.desc()).limit(PAGE + 1)
    found = _found(connection, query)
    some = sa.select(sa.literal(1)).select_from(inputs).where(*asked.conditions).limit(MOST)
    count = connection.execute(sa.select(sa.func.count()).select_from(some.subquery())).scalar_one()
    return Page(found[:PAGE], len(found) > PAGE, count)


def one(connection: sa.Connection, id: UUID) -> Found | None:
    """Return an input by its id; None if there is none, or no longer."""
    return next(iter(_found(connection, _FOUND.where(inputs.c.id == id))), None)


def mark(connection: sa.Connection, id: UUID, new: Marked) -> Mark | None:
    """Mark an input, or take its mark back; return the mark it had.

    Raises:
        KeyError: there is no such input, or no longer.
    """
    own = inputs.c.id == id
    before = connection.execute(sa.select(inputs.c.mark).where(own).with_for_update()).first()
    if before is None:
        raise KeyError(id)
    connection.execute(sa.update(inputs).where(own).values(mark=new.mark))
    values: dict[str, Any] = {f.name: getattr(new, f.name) for f in fields(Marked)}
    connection.execute(sa.insert(marks).values(input=id, **values))
    return Mark(before.mark) if before.mark else None


_TEXT = sa.func.substr(inputs.c.text, 1, CHARS).label("text")
_FOUND = sa.select(
    *(_TEXT if name == "text" else inputs.c[name] for name in NAMES),
    sa.func.length(inputs.c.text).label("chars"),
)


def _found(connection: sa.Connection, query: sa.Select[Any]) -> list[Found]:
    rows = connection.execute(query).mappings().all()
    latest = sa.select(marks).where(marks.c.input.in_([row["id"] for row in rows]))
    marked = {
        row.input: Marked(Mark(row.mark) if row.mark else None, row.who, row.time)
        for row in connection.execute(latest.order_by(marks.c.number))
    }
    return [
        Found(Row(**{name: row[name] for name in NAMES}), row["chars"], marked.get(row["id"]))
        for row in rows
    ]
