"""What a page is to show, as parameters of its address."""

from datetime import datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from service.audit.exceptions import NOTE_CHARS, ReviewedException
from service.audit.review import MarkEvent, ReviewFilter
from service.audit.rows import Mark
from service.audit.statistics import StatisticsFilter

PERIODS: dict[str, tuple[str, timedelta, timedelta]] = {
    "1h": ("last hour", timedelta(hours=1), timedelta(minutes=1)),
    "6h": ("last 6 hours", timedelta(hours=6), timedelta(minutes=5)),
    "24h": ("last 24 hours", timedelta(hours=24), timedelta(minutes=30)),
    "7d": ("last 7 days", timedelta(days=7), timedelta(hours=3)),
    "30d": ("last 30 days", timedelta(days=30), timedelta(hours=12)),
}
"""Name and length of each period, and the width of a bar in its plots."""

EXCEPTION_DAYS = (
    ("1", "a day"),
    ("7", "a week"),
    ("30", "30 days"),
    ("90", "90 days"),
    ("365", "a year"),
)
"""Choices of how long an exception holds."""


class ConsoleQuery(BaseModel):
    """Inputs of a period, and of one bundle or, if the string is empty, of all."""

    model_config = ConfigDict(frozen=True)

    period: Literal["1h", "6h", "24h", "7d", "30d"] = "24h"
    bundle: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""

    def scope(self, now: datetime) -> StatisticsFilter:
        """Return the filter for the audit."""
        return StatisticsFilter(now - PERIODS[self.period][1], now, self.bundle or None)


class ReviewQuery(ConsoleQuery):
    """Inputs with a finding."""

    finding: Literal["", "triggered", "unfamiliar"] = ""
    mark: Literal["", "none", "poisoned", "false_alarm"] = "none"
    decision: Literal["", "allow", "sanitize", "flag", "reject"] = ""
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{0,128}$")] = ""

    def filter(self, now: datetime) -> ReviewFilter:
        """Return the filter for the audit."""
        return ReviewFilter(
            self.scope(now),
            self.finding or None,
            self.mark or None,
            self.decision or None,
            self.request_id or None,
        )


class ReviewPageQuery(ReviewQuery):
    """A page of the review queue, and the outcome of marking an input there."""

    before: AwareDatetime | None = None
    before_id: UUID | None = None
    """Time and id of the last input on the page before; None for the first page."""
    done: UUID | None = None
    """The input that was just marked."""
    was: Literal["", "poisoned", "false_alarm"] = ""
    """Its mark before."""

    @property
    def after(self) -> tuple[datetime, UUID] | None:
        """Time and id of the input that the page comes after; None for the first page."""
        return (self.before, self.before_id) if self.before and self.before_id else None


class ExceptionRequest(ReviewPageQuery):
    """A submitted form: the page that it is on, and the exception for one of its inputs."""

    days: Literal["1", "7", "30", "90", "365"]
    note: Annotated[
        str,
        # PostgreSQL's texts have no NUL.
        StringConstraints(
            strip_whitespace=True, min_length=1, max_length=NOTE_CHARS, pattern=r"^[^\x00]*$"
        ),
    ]

    def exception(self, digest: str, hmac: str, user: str, now: datetime) -> ReviewedException:
        """Return the exception to be kept."""
        expires = now + timedelta(days=int(self.days))
        return ReviewedException(digest, hmac, now, expires, user, self.note)


class MarkRequest(ReviewPageQuery):
    """A submitted form: the page that it is on, and the new mark; empty takes the mark back."""

    new: Literal["", "poisoned", "false_alarm"]

    def mark_event(self, user: str, now: datetime) -> MarkEvent:
        """Return the event to be kept."""
        return MarkEvent(Mark(self.new) if self.new else None, user, now)
