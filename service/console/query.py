"""What a page is asked to show, as it stands in its address."""

from datetime import datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service.audit.review import Filter, Marked
from service.audit.rows import Mark
from service.audit.statistics import StatisticsFilter

PERIODS: dict[str, tuple[str, timedelta, timedelta]] = {
    "1h": ("last hour", timedelta(hours=1), timedelta(minutes=1)),
    "6h": ("last 6 hours", timedelta(hours=6), timedelta(minutes=5)),
    "24h": ("last 24 hours", timedelta(hours=24), timedelta(minutes=30)),
    "7d": ("last 7 days", timedelta(days=7), timedelta(hours=3)),
    "30d": ("last 30 days", timedelta(days=30), timedelta(hours=12)),
}
"""What each is called, how long it is, and how much of it is one bar of a plot."""


class ConsoleQuery(BaseModel):
    """Inputs of some time, and of a bundle; an empty string is all of them."""

    model_config = ConfigDict(frozen=True)

    period: Literal["1h", "6h", "24h", "7d", "30d"] = "24h"
    bundle: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""

    def scope(self, now: datetime) -> StatisticsFilter:
        """Return the inputs that are meant."""
        return StatisticsFilter(now - PERIODS[self.period][1], now, self.bundle or None)


class ReviewQuery(ConsoleQuery):
    """Inputs that were found poisoned."""

    mark: Literal["", "none", "poisoned", "false_alarm"] = "none"
    decision: Literal["", "allow", "sanitize", "flag", "reject"] = ""
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{0,128}$")] = ""

    def filter(self, now: datetime) -> Filter:
        """Return the inputs that are meant."""
        wanted = (self.mark or None, self.decision or None, self.request_id or None)
        return Filter(self.scope(now), *wanted)


class ReviewPageQuery(ReviewQuery):
    """A page of them, and perhaps what was done on the one before."""

    before: AwareDatetime | None = None
    before_id: UUID | None = None
    """The last input of the page before, by time and id; None asks for the first page."""
    done: UUID | None = None
    """The input that was just marked."""
    was: Literal["", "poisoned", "false_alarm"] = ""
    """What it was marked as before."""

    @property
    def behind(self) -> tuple[datetime, UUID] | None:
        """Where the page begins."""
        return (self.before, self.before_id) if self.before and self.before_id else None


class MarkRequest(ReviewPageQuery):
    """A form that was sent: the mark, empty to take it back, and the page that it was sent from."""

    new: Literal["", "poisoned", "false_alarm"]

    def marked(self, who: str, now: datetime) -> Marked:
        """Return what is to be kept."""
        return Marked(Mark(self.new) if self.new else None, who, now)
