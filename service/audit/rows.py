"""The row of one input."""

import hmac
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid4

from service.schemas import Decision

EXCEPTION = "exception"
"""Reason of a decision that a reviewed exception made."""


class Mark(StrEnum):
    """Judgement of a person about an input."""

    POISONED = "poisoned"
    FALSE_ALARM = "false_alarm"


@dataclass(frozen=True, slots=True)
class Row:
    """An input that was answered; the results of screening are None if screening failed."""

    time: datetime
    """Time of the answer, in UTC."""
    request_id: str
    number: int
    """Index of the input in its request, from 0."""
    route: str
    decision: str | None
    """None if none was made: `/screen` only gives verdicts."""
    mode: str
    detector: str | None
    confidence: float | None
    score: float | None
    threshold: float | None
    p_value: float | None
    finding: str | None
    """`triggered` or `unfamiliar`; None if nothing was found. Not implied by the decision."""
    poisoned: bool | None
    """Whether the finding is `triggered`."""
    truncated: bool | None
    label: str | None
    """Best class; None if the input was not classified."""
    digest: str
    """Digest of the bundle that screened the input."""
    text: str | None
    """Original text; None unless texts are kept."""
    text_hmac: str | None = None
    """HMAC-SHA256 of the text in UTF-8, in hexadecimal; None without a key."""
    model: str | None = None
    """Name of the model; None in rows of versions that did not keep it."""
    caller: str | None = None
    """Name of the API key; None if the service has no keys."""
    override: float | None = None
    """Score of the override test; None if it was not asked."""
    override_threshold: float | None = None
    override_p_value: float | None = None
    reason: str | None = None
    """`EXCEPTION` if the finding was set aside by one; else None."""
    sample_rate: float = 1.0
    """Probability with which rows like this one are kept: it stands for `1 / sample_rate` inputs.
    1 in rows of versions that kept all."""
    mark: str | None = None
    """One of `Mark`; None if not marked."""
    id: UUID = field(default_factory=uuid4)
    """Made here and not by the store, so that a row written twice is stored once."""


NAMES = tuple(f.name for f in fields(Row))


def is_plain(row: Row) -> bool:
    """Return whether an input was screened, nothing was found, and nothing stood in its way."""
    passed = row.decision in (None, Decision.ALLOW)  # `/screen` makes no decision
    return passed and row.poisoned is False and row.finding is None and row.reason is None


def is_sampled(id: UUID, rate: float) -> bool:
    """Return whether a row is among those that are kept at a rate, by 48 random bits of its id.

    Not by the request id: callers choose that, and could choose one that is never kept. The id is
    random and made here. What is kept at a rate is kept at every higher one.
    """
    return (id.int >> 80) < rate * 2**48


def hmac_of(key: bytes, text: str) -> str:
    """Return the HMAC-SHA256 of a text in UTF-8, in hexadecimal.

    Raises:
        UnicodeEncodeError: the text holds half a character.
    """
    return hmac.digest(key, text.encode(), "sha256").hex()


def as_dict(row: Row) -> dict[str, object]:
    """Return a row as a dict, by column."""
    return {name: getattr(row, name) for name in NAMES}


def as_json(row: Row) -> dict[str, object]:
    """Return a row as a dict for JSON."""
    return as_dict(row) | {"id": str(row.id), "time": row.time.isoformat()}
