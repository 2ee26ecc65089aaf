"""What is kept of one input."""

from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid4


class Mark(StrEnum):
    """What a person found about an input."""

    POISONED = "poisoned"
    FALSE_ALARM = "false_alarm"


@dataclass(frozen=True, slots=True)
class Row:
    """An input that was answered; what screening says of it is None if screening failed."""

    time: datetime
    """When the request was answered, in UTC."""
    request_id: str
    number: int
    """Of the input in its request, from 0."""
    route: str
    decision: str | None
    """None where none was made: `/screen` only gives verdicts."""
    mode: str
    detector: str | None
    confidence: float | None
    score: float | None
    threshold: float | None
    p_value: float | None
    poisoned: bool | None
    """In shadow mode the decision does not tell."""
    truncated: bool | None
    label: str | None
    """What the classifier said; None if it was not asked."""
    digest: str
    """Of the bundle that judged."""
    text: str | None
    """As it came; kept only if the settings say so."""
    text_hmac: str | None = None
    """HMAC-SHA256 of the text in UTF-8, in hexadecimal; None without a key."""
    model: str | None = None
    """Name of the model that the request was for; None of rows from before it was kept."""
    caller: str | None = None
    """Name of the API key that it came with; None if none was asked for."""
    mark: str | None = None
    """One of `Mark`, or nothing yet."""
    id: UUID = field(default_factory=uuid4)
    """Ours and not the store's, so that a row written twice is there once."""


NAMES = tuple(f.name for f in fields(Row))


def as_dict(row: Row) -> dict[str, object]:
    """Return a row by the names of its columns."""
    return {name: getattr(row, name) for name in NAMES}


def as_json(row: Row) -> dict[str, object]:
    """Return a row as it is exported."""
    return as_dict(row) | {"id": str(row.id), "time": row.time.isoformat()}
