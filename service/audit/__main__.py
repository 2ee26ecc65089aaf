"""`python -m service.audit`, also `psim audit`: export the audit as JSONL or CSV."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import TextIO

from models.detection.screen import Finding
from models.formulas import guarded
from service.audit.rows import NAMES, Mark, Row, as_json
from service.audit.schema import AuditError
from service.audit.store import AuditStore
from service.schemas import Decision


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the selected rows to stdout; exit with code 2 if there is no audit."""
    options = _parser().parse_args(arguments)
    write = _write_csv if options.format == "csv" else _write_jsonl
    try:
        if not options.url:
            raise AuditError("set PSIM_AUDIT_URL to that of the service, or give --url")
        with closing(AuditStore(options.url, read_only=True)) as store:
            rows = store.read(
                options.since,
                options.until,
                options.decision,
                options.request_id,
                options.mark,
                options.model,
                options.finding,
            )
            write(rows, sys.stdout)
            sys.stdout.flush()
    except AuditError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # `psim audit | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psim audit",
        description="Export what the service decided about inputs, oldest first, to stdout.",
    )
    when = "%(metavar)s is ISO 8601, such as 2026-11-25 or 2026-11-25T14:30; UTC if it has no zone"
    parser.add_argument("--since", type=_time, metavar="TIME", help=f"leave out older rows; {when}")
    parser.add_argument(
        "--until", type=_time, metavar="TIME", help="leave out rows of this time or newer"
    )
    parser.add_argument(
        "--decision",
        action="append",
        default=[],
        choices=[str(decision) for decision in Decision],
        help="only rows with it; may be given several times",
    )
    parser.add_argument(
        "--finding",
        action="append",
        default=[],
        choices=[str(finding) for finding in Finding],
        help="only rows in which it was found; may be given several times",
    )
    parser.add_argument(
        "--mark",
        action="append",
        default=[],
        choices=[str(mark) for mark in Mark],
        help="only rows that were marked so in the console; may be given several times",
    )
    parser.add_argument("--model", metavar="NAME", help="only requests to this model")
    parser.add_argument("--request-id", metavar="ID", help="only this request")
    parser.add_argument("--format", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument(
        "--url",
        default=os.environ.get("PSIM_AUDIT_URL"),
        help="URL of the store; by default PSIM_AUDIT_URL",
    )
    return parser


def _time(value: str) -> datetime:
    parsed = datetime.fromisoformat(value)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _write_jsonl(rows: Iterable[Row], out: TextIO) -> None:
    for row in rows:
        out.write(json.dumps(as_json(row), ensure_ascii=False) + "\n")


def _write_csv(rows: Iterable[Row], out: TextIO) -> None:
    writer = csv.DictWriter(out, NAMES, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in rows:
        cells = as_json(row).items()
        writer.writerow({n: guarded(cell) if isinstance(cell, str) else cell for n, cell in cells})


if __name__ == "__main__":
    main()
