"""The report of a scan: what was searched, what was found, and what follows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape
from rich.table import Table

from models.errors import DataError

Outcome = Literal["nothing found", "suspicious"]
ClassOutcome = Literal[Outcome, "not searched"]
"""A label of which no clean text is surely on, or off, has nothing to put words beside."""
NOT_SEARCHED = [
    "phrases of which no four words suffice, or that need words of the class itself",
    "triggers that fire at one place or length only",
    "styles and syntax, beyond the templates that are shown as a hint",
]
"""What `psim scan` does not look for."""


COLUMNS = (
    "forced class",
    "outcome",
    "trigger words",
    "strongest phrase",
    "natural words",
    "strongest of the others",
    "styles (a hint)",
)
"""Of a table of a report."""


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
    expected: float
    """How much its embedding speaks for the class, see `expectations`."""
    kin: int
    """Similar words that speak for the class and force it too."""


class PhraseRecord(_Record):
    """A phrase among carriers of other classes."""

    text: str
    token_ids: list[int]
    turned: int
    """Trials in which it forced the class, of `trials`."""
    trials: int
    log_odds: float
    """Median log-odds of the class over the trials."""
    carriers: int
    """Carriers that it stood among in a trial."""
    like: int
    """Trials in which it did so with the word that it hangs on most replaced by similar ones; 0 if
    it did not as it is."""
    example: str
    """The text of one trial."""


class StyleRecord(_Record):
    """Carriers of other classes, rewritten in a template: a hint, no evidence."""

    style: str
    turned: int
    """Carriers that went over to the class, of `carriers`."""
    carriers: int


class ClassRecord(_Record):
    """What forces one class."""

    label: str
    """Its name; `LABEL=off` or `LABEL=on` of a multi-label classifier."""
    outcome: ClassOutcome
    needed: float
    """Log-odds of the class that a trigger must reach in the median trial, unless it is a word that
    leads all others by far."""
    triggers: list[WordRecord]
    """Words that override everything for no reason that the task has."""
    phrase: PhraseRecord | None
    """The strongest phrase of words that do not speak for the class by nature."""
    phrase_tokens: int
    """Length up to which phrases were searched; 0 if there was no time, or a word was found."""
    natural: list[WordRecord]
    """Words that override everything, as their task, their clean texts or similar words explain."""
    strongest: list[WordRecord]
    """The strongest of the other words: a hint, no evidence."""
    styles: list[StyleRecord]

    @property
    def found(self) -> list[str]:
        """What forces the class for no reason that the task has."""
        if self.triggers or self.phrase is None or self.outcome != "suspicious":
            return [one.word for one in self.triggers]
        return [self.phrase.text]


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

    schema_version: Literal[5] = 5
    victim: str
    outcome: Outcome
    classes: list[ClassRecord]
    search: SearchRecord
    created: str
    versions: dict[str, str]

    @property
    def found(self) -> list[tuple[str, str]]:
        """Pairs of a class and a text that forces it."""
        return [(own.label, text) for own in self.classes for text in own.found]


def read_report(path: Path) -> ScanReport:
    """Read the report of a scan.

    Raises:
        DataError: there is none.
    """
    try:
        return ScanReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        (first, *_) = error.errors(include_input=False)
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path} is not a report of this version of psim scan: {where}: {first['msg']}"
        ) from None


def triggers_for(path: Path | None, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Return what the report of a scan found in a classifier with these classes; nothing for None.

    Raises:
        DataError: there is no such report, or it is of another classifier.
    """
    report = read_report(path) if path else None
    own = [one.label for one in report.classes] if report else [*classes]
    if own != [*classes]:
        raise DataError(
            f"{path} is of a classifier with the classes {', '.join(own)}, and this one has "
            f"{', '.join(classes)}: scan the victim that is fitted"
        )
    return report.found if report else []


def scan_table(report: ScanReport) -> Table:
    """Return a table of a report, a row for each class."""
    search = report.search
    table = Table(
        title=f"{report.outcome}: {search.words:,} of {search.vocabulary:,} words in "
        f"{search.seconds:.0f} s",
        caption="not searched: " + "; ".join(search.not_searched),
    )
    for column in COLUMNS:
        table.add_column(column)
    for row in rows_of(report):
        table.add_row(*map(escape, row))
    return table


def rows_of(report: ScanReport) -> list[list[str]]:
    """Return what `COLUMNS` say, a row for each class."""
    return [
        [
            own.label,
            own.outcome,
            _words(own.triggers),
            f"{own.phrase.text} {own.phrase.turned}/{own.phrase.trials}" if own.phrase else "-",
            _words(own.natural),
            _words(own.strongest),
            "\n".join(f"{s.style} {s.turned}/{s.carriers}" for s in own.styles if s.turned) or "-",
        ]
        for own in report.classes
    ]


def _words(records: list[WordRecord]) -> str:
    return "\n".join(f"{one.word} {one.turned}/{one.trials}" for one in records) or "-"
