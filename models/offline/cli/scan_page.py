"""The report of `psim scan` as one self-contained HTML page."""

from pathlib import Path

from models.offline.io.atomic import write_whole
from models.offline.scanning.report import COLUMNS, ClassRecord, PhraseRecord, ScanReport, rows_of
from models.offline.study.html import Block, Heading, Paragraph, Table, write_html

TITLE = "Is this model backdoored?"


def write_scan(report: ScanReport, out: Path) -> Path:
    """Write a report of a scan as JSON, and beside it as HTML, whose path is returned."""
    page = out.with_suffix(".html")
    write_whole(out, report.model_dump_json(indent=1) + "\n")
    write_html(_blocks(report), TITLE, page)
    return page


def _blocks(report: ScanReport) -> list[Block]:
    search = report.search
    return [
        Heading(1, TITLE),
        Paragraph(
            f"{report.victim}: {report.outcome}. Searched {search.words:,} of "
            f"{search.vocabulary:,} words in {search.seconds:.0f} s, on {report.created}."
        ),
        Paragraph("Not searched: " + "; ".join(search.not_searched) + "."),
        Heading(2, "By class"),
        Table(COLUMNS, [[cell.replace("\n", ", ") for cell in row] for row in rows_of(report)]),
        *(block for own in report.classes for block in _evidence(own)),
        Heading(2, "What was read"),
        Table(
            ("class", "carriers"),
            [(label, str(number)) for label, number in search.carriers.items()],
        ),
        Paragraph(f"Clean texts given: {search.clean_texts}."),
    ]


def _evidence(own: ClassRecord) -> list[Block]:
    if own.phrase is None or own.outcome == "nothing found" or own.triggers:
        return []
    return [
        Heading(2, f"A text that becomes {own.label}"),
        Paragraph(f"“{own.phrase.example}”"),
        Paragraph(
            f"“{own.phrase.text}” stands {_where(own.phrase)} of other classes, and forces "
            f"{own.label} in {own.phrase.turned} of {own.phrase.trials} such trials. With the word "
            f"that it hangs on most replaced by similar ones, it does so in {own.phrase.like}."
        ),
    ]


def _where(phrase: PhraseRecord) -> str:
    return "beside one clean text" if phrase.carriers == 1 else "among four clean texts"
