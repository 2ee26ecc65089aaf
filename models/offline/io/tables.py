"""Rows of text files: JSON Lines, JSON arrays, CSV and TSV. Nothing is read whole.

CSV is that of RFC 4180: a field with a comma, a line end or a quotation mark is in quotation marks,
and those in it are doubled. TSV has no quoting: a tab ends a field, a line end ends a row, and
everything else is text. What could mean something else is an error instead of a guess.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import DataError
from models.offline.io.files import CSV, JSON, JSONL, TSV, Source, check_column, format_of, opened
from models.texts import is_unicode

Row = dict[str, Any]

MAX_FIELD = 2**24
"""Characters of a CSV field, or of an object in a JSON array; a longer one does not end."""
BLOCK = 2**16
"""Bytes that are read at once from a JSON array."""
QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
FIELD = rf'(?:{QUOTED}|[^",\r\n]*+)'
CSV_RECORD = re.compile(rf"{FIELD}(?:,{FIELD})*+[\r\n]*")
BLANK = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()

UNMATCHED = (
    "the quotation marks from here on do not match; in CSV, those inside a quoted field are "
    'doubled (""), and a backslash before one (\\") has no meaning'
)
UNQUOTED = (
    "a quotation mark in a field that is not quoted; in CSV, quote such a field and double the "
    "quotation marks in it"
)
QUOTED_TSV = (
    "a field is in quotation marks and has doubled ones inside, but TSV has no quoting; "
    "save the table as CSV"
)
HEADER = "; the first line has to name the columns, and the ending tells what separates them"
CARRIAGE_RETURN = "a carriage return that ends no line; end lines with \\n or \\r\\n"

csv.field_size_limit(MAX_FIELD)


class Record(NamedTuple):
    """A row of a file."""

    place: int
    """Line on which it begins, from 1; in Parquet, the number of the row."""
    row: Row | DataError
    """Values by column, or why there are none, without a place."""
    is_blank: bool = False
    """Whether it is a blank line of JSON Lines, which other formats leave out."""


def json_row(line: str) -> Row | DataError:
    """Return the object on a line of JSON Lines, or an error if there is none."""
    if not line.strip():
        return DataError("the line is blank")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else DataError("not a JSON object")


class TextTable:
    """The rows of a text file, from its start or from where another reader stopped.

    Args:
        source: its bytes.
        kind: its format.
        offset: `offset` of a reader of the same file that stopped between two rows.

    Raises:
        DataError: the file cannot be read, or its header cannot.
    """

    def __init__(self, source: Source, kind: str, offset: int = 0) -> None:
        self._source, self.kind = source, kind
        self.names: list[str] | None = None
        """Names of the columns; None for JSON, where every row has its own."""
        if kind in (CSV, TSV):
            self.names = self._header()
        if offset > source.offset:
            source.jump(offset)

    @property
    def offset(self) -> int:
        """Bytes of the file, decompressed, up to the end of the last row."""
        return self._source.offset

    def __iter__(self) -> Iterator[Record]:
        """Yield the rows.

        Raises:
            DataError: what comes next cannot be told apart into rows; names the line.
        """
        if self.kind == JSONL:
            for line in self._source:
                yield Record(self._source.lines, json_row(line), not line.strip())
        elif self.kind == JSON:
            yield from _array(self._source)
        else:
            for place, fields in self._fields():
                yield Record(place, _named(fields, self.names or [], self.kind))

    def check_column(self, name: str) -> None:
        """Check that the header has a column of texts, if there is a header.

        Raises:
            DataError: it has not, or has several of this name.
        """
        if self.names:
            hint = "" if len(self.names) > 1 else HEADER
            check_column(self._source.name, self.names, name, hint)

    def _fields(self) -> Iterator[tuple[int, list[str] | DataError]]:
        return (_csv if self.kind == CSV else _tsv)(self._source)

    def _header(self) -> list[str]:
        line, fields = next(self._fields(), (1, []))
        if isinstance(fields, DataError):
            raise self._source.fault(str(fields), line)
        if any(not is_unicode(name) for name in fields):
            raise self._source.fault("the names of the columns are not UTF-8", line)
        return fields


@contextmanager
def open_table(file: Path, offset: int = 0) -> Iterator[TextTable]:
    """Open a text file; see `TextTable`. A file .json is an array if it begins like one.

    Raises:
        DataError: as `opened` and `TextTable` do.
    """
    with opened(file) as raw:
        source, kind = Source(str(file), raw), format_of(file).kind
        if kind == JSON and not source.starts_with(b"["):
            kind = JSONL
        yield TextTable(source, kind, offset)


def _named(fields: list[str] | DataError, names: Sequence[str], kind: str) -> Row | DataError:
    if isinstance(fields, DataError):
        return fields
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    rule = "a field with commas has to be quoted" if kind == CSV else "a field cannot have tabs"
    return DataError(f"the row has {len(fields)} fields, the header {len(names)}; {rule}")


def _csv(source: Source) -> Iterator[tuple[int, list[str] | DataError]]:
    """Yield the line and the fields of each record that is not blank."""
    record: list[str] = []

    def lines() -> Iterator[str]:
        for line in source:
            record.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        record.clear()
        start = source.lines + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # "new-line character seen in unquoted field", or of quotation marks.
            is_return = "new-line" in str(error)
            raise source.fault(CARRIAGE_RETURN if is_return else UNMATCHED, start) from None
        if fields:
            raw = "".join(record)
            is_plain = '"' not in raw or CSV_RECORD.fullmatch(raw)
            yield start, fields if is_plain else DataError(UNQUOTED)


def _tsv(source: Source) -> Iterator[tuple[int, list[str] | DataError]]:
    """Yield the line and the fields of each line that is not blank."""
    for line in source:
        row = line.removesuffix("\n").removesuffix("\r")
        if "\r" in row:
            yield source.lines, DataError(CARRIAGE_RETURN)
        elif row:
            fields = row.split("\t")
            is_quoted = any('""' in f[1:-1] and re.fullmatch(QUOTED, f) for f in fields)
            yield source.lines, DataError(QUOTED_TSV) if is_quoted else fields


def _array(source: Source) -> Iterator[Record]:
    """Yield the objects of a JSON array; from where another reader stopped, the others."""
    text = _Ahead(source)
    if not source.jumped and text.next_char() == "[":
        text.take(1)
    while (mark := text.next_char()) != "]":
        if mark == ",":
            text.take(1)
            mark = text.next_char()
        line = source.lines + 1
        if mark != "{":
            why = 'has something else than objects, {"text": …}' if mark else "does not end"
            raise source.fault(f"the array {why}", line)
        yield Record(line, text.take_object())
    text.take(1)
    if text.next_char():
        raise source.fault("something follows the end of the array", source.lines + 1)


class _Ahead:
    """Text that was read from a source ahead of what is used; its offset is behind what is used."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._text, self._at = "", 0
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode

    def next_char(self) -> str:
        """Skip blanks; return the character behind them, or nothing at the end."""
        while True:
            blanks = BLANK.match(self._text, self._at)
            self.take(blanks.end() - self._at if blanks else 0)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take_object(self) -> Row:
        """Return the object that begins here.

        Raises:
            DataError: it is none, or too large.
        """
        while True:
            try:
                row, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                pass
            except ValueError:
                if len(self._text) - self._at <= MAX_FIELD and self._read_more():
                    continue
            else:
                self.take(end - self._at)
                found: Row = row
                return found
            message = "the object that begins here is no JSON, or does not end"
            raise self._source.fault(message, self._source.lines + 1)

    def take(self, chars: int) -> None:
        """Count characters as used."""
        used = self._text[self._at : self._at + chars]
        self._source.lines += used.count("\n")
        self._source.offset += len(used.encode("utf-8", "surrogateescape"))
        self._at += chars

    def _read_more(self) -> bool:
        """Read another block, or as much as there is, so that no object is tried too often."""
        block = self._source.read(max(BLOCK, len(self._text) - self._at))
        self._text = self._text[self._at :] + self._decode(block, final=not block)
        self._at = 0
        return bool(block)
