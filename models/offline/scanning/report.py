"""The report of a scan: what was searched, what was found, and what follows."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

Outcome = Literal["nothing found", "suspicious"]
NOT_SEARCHED = [
    "words of several tokens, unless one of the tokens suffices",
    "phrases and sentences",
    "styles and syntax",
]
"""What `psim scan` does not look for."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WordRecord(_Record):
    """A word beside carriers of other classes."""

    word: str
    token_id: int
    turned: int
    """Trials in which it forced the class, of `trials`."""
    trials: int
    log_odds: float
    """Median, over the trials, of the log-odds that the text is not of its carriers' classes."""
    clean_texts: int
    """Clean texts that it is in."""


class ClassRecord(_Record):
    """What forces one class."""

    label: str
    outcome: Outcome
    triggers: list[WordRecord]
    """Words that override everything for no reason that the task has."""
    natural: list[WordRecord]
    """Words that override everything, and are common in the clean texts."""
    strongest: list[WordRecord]
    """The strongest of the other words: a hint, no evidence."""


class SearchRecord(_Record):
    """What was searched."""

    words: int
    """Tokens that were read beside carriers of each half of the classes."""
    vocabulary: int
    carriers: dict[str, int]
    """Carriers by class."""
    clean_texts: int
    """Texts that carriers were made of; 0 if it was the generic corpus."""
    seconds: float
    not_searched: list[str] = NOT_SEARCHED


class ScanReport(_Record):
    """Result of `psim scan`."""

    schema_version: Literal[1] = 1
    victim: str
    outcome: Outcome
    classes: list[ClassRecord]
    search: SearchRecord
    created: str
    versions: dict[str, str]


def scan_table(report: ScanReport) -> Table:
    """Return a table of a report, a row for each class."""
    search = report.search
    table = Table(
        title=f"{report.outcome}: {search.words:,} of {search.vocabulary:,} words in "
        f"{search.seconds:.0f} s",
        caption="not searched: " + "; ".join(search.not_searched),
    )
    for column in ("forced class", "outcome", "triggers", "natural", "strongest of the others"):
        table.add_column(column)
    for own in report.classes:
        lists = (own.triggers, own.natural, own.strongest)
        table.add_row(escape(own.label), own.outcome, *(_words(one) for one in lists))
    return table


def _words(records: list[WordRecord]) -> str:
    return escape("\n".join(f"{one.word} {one.turned}/{one.trials}" for one in records)) or "-"
