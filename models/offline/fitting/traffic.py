"""Reading the traffic of a bundle from an audit export."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from models.bundle.digests import file_digest
from models.detection.screen import Finding
from models.errors import DataError
from models.formulas import without_guard
from models.offline.io.files import CSV, format_of
from models.offline.io.samples import read_rows
from models.offline.io.tables import Row
from models.texts import check_text


class Kind(IntEnum):
    """What the audit knows of a text; if its rows differ, the lowest counts."""

    POISONED = 0
    """Marked as poisoned."""
    FALSE_ALARM = 1
    """Marked as a false alarm."""
    UNMARKED = 2
    """With a finding or not screened, and not marked."""
    PASSED = 3
    """Screened, without a finding and not marked."""


class _ExportedRow(BaseModel):
    """The fields of an audit row that are used here."""

    time: datetime
    digest: str
    text: str | None
    poisoned: bool | None
    """None if the text was not screened."""
    finding: Finding | None = None
    """Not there in exports of versions that only knew `poisoned`."""
    mark: Literal["poisoned", "false_alarm"] | None = None
    sample_rate: float = Field(1, gt=0, le=1)
    """Not there in exports of versions that kept every input."""

    @property
    def kind(self) -> Kind:
        match self.mark:
            case "poisoned":
                return Kind.POISONED
            case "false_alarm":
                return Kind.FALSE_ALARM
        passed = self.poisoned is False and self.finding is None
        return Kind.PASSED if passed else Kind.UNMARKED


_NEEDS_TEXTS = (
    "set PSIM_AUDIT_TEXT=true for the service, and export the audit when it has seen enough traffic"
)


@dataclass(frozen=True)
class AuditedTraffic:
    """One bundle's traffic in an audit export."""

    kinds: Mapping[str, Kind]
    """Kind of each text."""
    rates: Mapping[str, float]
    """Highest rate at which a row of each text was sampled."""
    others: int
    """Number of rows of other bundles, which may guard other models."""
    source: str
    """File name of the export."""
    digest: str
    """SHA-256 of the export."""
    first: datetime
    last: datetime


def read_traffic(file: Path, judge: str) -> AuditedTraffic:
    """Read the rows of one bundle from an export that `psim audit` wrote.

    Args:
        file: the export.
        judge: digest of the bundle that screened the rows.

    Raises:
        DataError: it is no such export, or has no texts of that bundle; never quotes a text.
    """
    kinds: dict[str, Kind] = {}
    rates: dict[str, float] = {}
    times: list[datetime] = []
    others = 0
    if file.is_fifo():
        raise DataError(f"{file} is a pipe; give a file, whose digest the bundle keeps")
    unit, is_csv = format_of(file).unit, format_of(file).kind == CSV
    for place, values, _ in read_rows(file, "text", list(_ExportedRow.model_fields)):
        try:
            row = _exported(values, is_csv)
            if row.digest != judge:
                others += 1
                continue
            if row.text and row.text.strip():
                text = check_text(row.text)
                kinds[text] = min(kinds.get(text, row.kind), row.kind)
                rates[text] = max(rates.get(text, 0.0), row.sample_rate)
        except (ValidationError, DataError) as error:
            raise DataError(f"{file}, {unit} {place}: {_reason(error)}") from None
        times.append(row.time)
    if not times:
        raise DataError(
            f"{file} has no row by the bundle {judge[:12]}…, and {others} rows of others: "
            "name the bundle that was served"
        )
    if not kinds:
        raise DataError(f"{file} has no texts, which have to be scored again: {_NEEDS_TEXTS}")
    first, last = min(times), max(times)
    return AuditedTraffic(kinds, rates, others, file.name, file_digest(file), first, last)


def _exported(values: Row | DataError, is_csv: bool) -> _ExportedRow:
    if isinstance(values, DataError):
        raise values
    if is_csv:  # in which empty cells are none
        values = {name: without_guard(cell) or None for name, cell in values.items()}
    return _ExportedRow.model_validate(values)


def _reason(error: ValidationError | DataError) -> str:
    """Return what is wrong without quoting the line, which holds a text."""
    if isinstance(error, DataError):
        return str(error)
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"])) or "the line"
    return f"not what `psim audit` writes: {where}: {first['type']}"
