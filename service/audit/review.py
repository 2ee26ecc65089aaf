"""The review queue: inputs with a finding, for a person to confirm or refute."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from service.audit.rows import NAMES, Mark, Row
from service.audit.statistics import StatisticsFilter
from service.audit.store import flagged, inputs, marks

PAGE = 25
"""Inputs per page."""
UNMARKED = "none"
CHARS = 1000
"""Characters of a text that are shown; it may be much longer."""
MAX_COUNT = 1000
"""Most inputs that are counted."""


@dataclass(frozen=True, slots=True)
class MarkEvent:
    """A mark that was set, or taken back if it is None."""

    mark: Mark | None
    who: str
    time: datetime


@dataclass(frozen=True, slots=True)
class FlaggedInput:
    """An input with a finding, and with the beginning of its text if texts are kept."""

    row: Row
    chars: int | None
    """Length of the whole text."""
    latest_mark: MarkEvent | None
    """None if the input was never marked."""


@dataclass(frozen=True, slots=True)
class ReviewFilter:
    """Conditions on flagged inputs; None is any."""

    scope: StatisticsFilter
    finding: str | None = None
    mark: str | None = None
    """One of `Mark`, or `UNMARKED`."""
    decision: str | None = None
    request_id: str | None = None

    @property
    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The filter in SQL."""
        conditions = [flagged, *self.scope.conditions]
        for name in ("finding", "mark", "decision", "request_id"):
            value = getattr(self, name)
            if value is not None:
                wanted = None if value == UNMARKED else value
                conditions.append(inputs.c[name].is_not_distinct_from(wanted))
        return conditions


@dataclass(frozen=True, slots=True)
class Page:
    """Some flagged inputs, newest first."""

    inputs: Sequence[FlaggedInput]
    more: bool
    """Whether there are older ones."""
    count: int
    """Inputs on all pages; `MAX_COUNT` stands for that many or more."""


def page(
    connection: sa.Connection, filter: ReviewFilter, after: tuple[datetime, UUID] | None = None
) -> Page:
    """Return the newest inputs, or those that come after an input with this time and id."""
    query = _FLAGGED_INPUTS.where(*filter.conditions)
    if after:
        time, id = after
        same_time = sa.and_(inputs.c.time == time, inputs.c.id < id)
        query = query.where(inputs.c.time <= time, sa.or_(inputs.c.time < time, same_time))
    query = query.order_by(inputs.c.time.desc(), inputs.c.id.desc()).limit(PAGE + 1)
    found = _flagged_inputs(connection, query)
    some = sa.select(sa.literal(1)).select_from(inputs).where(*filter.conditions).limit(MAX_COUNT)
    count = connection.execute(sa.select(sa.func.count()).select_from(some.subquery())).scalar_one()
    return Page(found[:PAGE], len(found) > PAGE, count)


def flagged_input(connection: sa.Connection, id: UUID) -> FlaggedInput | None:
    """Return an input by its id; None if it does not exist, or no longer."""
    return next(iter(_flagged_inputs(connection, _FLAGGED_INPUTS.where(inputs.c.id == id))), None)


def mark(connection: sa.Connection, id: UUID, new: MarkEvent) -> Mark | None:
    """Mark an input, or take its mark back; return its mark before.

    Raises:
        KeyError: the input does not exist, or no longer.
    """
    this = inputs.c.id == id
    before = connection.execute(sa.select(inputs.c.mark).where(this).with_for_update()).first()
    if before is None:
        raise KeyError(id)
    connection.execute(sa.update(inputs).where(this).values(mark=new.mark))
    connection.execute(sa.insert(marks).values(input=id, **asdict(new)))
    return Mark(before.mark) if before.mark else None


_TEXT = sa.func.substr(inputs.c.text, 1, CHARS).label("text")
_FLAGGED_INPUTS = sa.select(
    *(_TEXT if name == "text" else inputs.c[name] for name in NAMES),
    sa.func.length(inputs.c.text).label("chars"),
)


def _flagged_inputs(connection: sa.Connection, query: sa.Select[Any]) -> list[FlaggedInput]:
    rows = connection.execute(query).mappings().all()
    history = sa.select(marks).where(marks.c.input.in_([row["id"] for row in rows]))
    latest = {
        event.input: MarkEvent(Mark(event.mark) if event.mark else None, event.who, event.time)
        for event in connection.execute(history.order_by(marks.c.number))
    }
    return [
        FlaggedInput(
            Row(**{name: row[name] for name in NAMES}), row["chars"], latest.get(row["id"])
        )
        for row in rows
    ]
