"""Large tables in fragments: runs of rows that are read on their own, a little at a time.

Of Parquet the footer says where rows are. A file of text is read once from end to end to find that
out, by the parser that reads its fragments later.
"""

import csv
import json
from bisect import bisect_left, bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError
from models.offline.io.samples import CHUNK, Row, json_row, text_of

BUFFER = 2**20
"""Bytes of a column of a Parquet file that are read at once."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (".parquet", ".jsonl", *SEPARATORS)
BROKEN = (pa.ArrowException, csv.Error, ValueError, OSError)
"""What the parsers raise; their messages may quote a text."""
OURS = "psim_"
"""How the columns that are added begin."""

csv.field_size_limit(2**24)  # a field that is longer lacks a quotation mark


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of rows of one file."""

    file: str
    number: int
    """From 0, in its file."""
    row: int
    """Number of its first row in the file, from 1: of JSONL every line is one, of CSV no header."""
    rows: int
    offset: int = 0
    """Byte at which it begins in a file of text."""

    def __str__(self) -> str:
        return f"{self.file}, rows {self.row} to {self.row + self.rows - 1}"


class Chunk(NamedTuple):
    """Some rows of a fragment."""

    texts: list[str | DataError]
    """The text of each, or why there is none."""
    columns: dict[str, pa.Array]


def fragments_of(file: Path, text_column: str, rows: int) -> list[Fragment]:
    """Divide a file into fragments of so many rows; the last one may have fewer.

    Raises:
        DataError: the file cannot be read, is of an unknown kind, or lacks the column.
    """
    if file.suffix not in KINDS:
        raise DataError(f"{file}: unknown format; there are {', '.join(KINDS)}")
    if file.suffix != ".jsonl":
        _check_columns(file, text_column)
    counts = _parquet_counts if file.suffix == ".parquet" else _text_counts
    found: list[Fragment] = []
    for offset, count in counts(file, rows):
        row = found[-1].row + found[-1].rows if found else 1
        found.append(Fragment(str(file), len(found), row, count, offset))
    return found


def read(fragment: Fragment, text_column: str) -> Iterator[Chunk]:
    """Yield a fragment's rows in order.

    Raises:
        DataError: the file cannot be read, or is not what it was when it was divided.
    """
    file = Path(fragment.file)
    chunks = _parquet_chunks if file.suffix == ".parquet" else _text_chunks
    done = 0
    try:
        for chunk in chunks(file, fragment, text_column):
            done += len(chunk.texts)
            yield chunk
    except BROKEN as error:
        raise _unreadable(file, error, fragment.row + done - 1) from error
    if done != fragment.rows:
        raise DataError(f"{fragment}: {fragment.rows - done} rows are gone; the file has changed")


def schema_of(fragment: Fragment) -> pa.Schema:
    """Return the columns of a fragment's rows: those of text are strings, of JSONL all that occur.

    Keys of JSONL that look like `OURS` are left out.

    Raises:
        DataError: the file cannot be read.
    """
    file = Path(fragment.file)
    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file).remove_metadata()
        jsonl = file.suffix == ".jsonl"
        with _opened(file, fragment.offset if jsonl else 0) as raw:
            if jsonl:
                rows = map(_json_row, islice(_lines(raw), fragment.rows))
                found = {key for row in rows if isinstance(row, dict) for key in row}
                names = sorted(key for key in found if not key.startswith(OURS))
            else:
                names = next(_records(file, raw), [])
    except BROKEN as error:
        raise _unreadable(file, error) from error
    return pa.schema([(name, pa.string()) for name in names])


def _unreadable(file: Path, error: Exception, row: int = 0) -> DataError:
    behind = f" behind row {row}" if row else ""
    return DataError(f"{file} cannot be read as {file.suffix}{behind}: {type(error).__name__}")


def _check_columns(file: Path, text_column: str) -> None:
    names = schema_of(Fragment(str(file), 0, 1, 0)).names
    if text_column not in names:
        raise DataError(
            f"{file} has no column {text_column!r}; it has {sorted(names)}; "
            "name the right one with --text-column"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{file} has several columns of one name: {sorted(names)}")
    if any(name.startswith(OURS) for name in names):
        raise DataError(f"{file} has columns {OURS}…, as what was screened already; rename them")


def _parquet_counts(file: Path, rows: int) -> Iterator[tuple[int, int]]:
    try:
        total = pq.read_metadata(file).num_rows
    except BROKEN as error:
        raise _unreadable(file, error) from error
    for start in range(0, total, rows):
        yield 0, min(rows, total - start)


def _text_counts(file: Path, rows: int) -> Iterator[tuple[int, int]]:
    number = 0
    try:
        with _opened(file) as raw:
            records = _records(file, raw)
            if file.suffix in SEPARATORS:
                next(records)
            offset = raw.tell()
            for number, _ in enumerate(records, 1):
                if number % rows == 0:
                    yield offset, rows
                    offset = raw.tell()
    except BROKEN as error:
        raise _unreadable(file, error, number) from error
    if number % rows:
        yield offset, number % rows


def _parquet_chunks(file: Path, fragment: Fragment, text_column: str) -> Iterator[Chunk]:
    start, left = fragment.row - 1, fragment.rows
    with pq.ParquetFile(file, buffer_size=BUFFER) as opened:
        every = range(opened.num_row_groups)
        ends = list(accumulate(opened.metadata.row_group(i).num_rows for i in every))
        first, last = bisect_right(ends, start), bisect_left(ends, start + left)
        # What is before the fragment in its row group is decoded in vain, which costs little.
        skip = start - (ends[first - 1] if first else 0)
        for batch in opened.iter_batches(CHUNK, row_groups=list(every[first : last + 1])):
            rows = batch.slice(min(skip, batch.num_rows), left)
            skip -= min(skip, batch.num_rows)
            left -= rows.num_rows
            texts = [text_of({text_column: t}, text_column) for t in rows[text_column].to_pylist()]
            yield Chunk(texts, dict(zip(rows.schema.names, rows.columns, strict=True)))


def _text_chunks(file: Path, fragment: Fragment, text_column: str) -> Iterator[Chunk]:
    names, left = schema_of(fragment).names, fragment.rows
    with _opened(file, fragment.offset) as raw:
        records = _records(file, raw)
        while records_here := list(islice(records, min(CHUNK, left))):
            left -= len(records_here)
            rows = [_row(record, names) for record in records_here]
            columns = {name: [_string(row, name) for row in rows] for name in names}
            arrays = {name: pa.array(column, pa.string()) for name, column in columns.items()}
            yield Chunk([text_of(row, text_column) for row in rows], arrays)


@contextmanager
def _opened(file: Path, offset: int = 0) -> Iterator[BinaryIO]:
    """Open a file of text at an offset; its byte order mark is no text."""
    with file.open("rb") as raw:
        if raw.read(len(BOM_UTF8)) != BOM_UTF8:
            raw.seek(0)
        if offset:
            raw.seek(offset)
        yield raw


def _lines(raw: BinaryIO) -> Iterator[str]:
    """Yield lines; bytes that are not UTF-8 become surrogates: an error of their row."""
    return (line.decode("utf-8", "surrogateescape") for line in raw)


def _records(file: Path, raw: BinaryIO) -> Iterator[Any]:
    """Yield lines of JSONL, or records of CSV."""
    if file.suffix == ".jsonl":
        return _lines(raw)
    return (
        record for record in csv.reader(_lines(raw), delimiter=SEPARATORS[file.suffix]) if record
    )


def _row(record: Any, names: Sequence[str]) -> Row | DataError:
    """Return a row by column, or why it has none."""
    if isinstance(record, str):
        return _json_row(record)
    if len(record) != len(names):
        return DataError(f"the row has {len(record)} fields, the header {len(names)}")
    return dict(zip(names, record, strict=True))


def _json_row(line: str) -> Row | DataError:
    row = json_row(line)
    return row if isinstance(row, DataError) else {_valid(key): row[key] for key in row}


def _string(row: Row | DataError, name: str) -> str | None:
    """Return a value as a string; what JSON has beside strings, as JSON."""
    value = None if isinstance(row, DataError) else row.get(name)
    if value is None or isinstance(value, str):
        return value and _valid(value)
    return json.dumps(value)


def _valid(text: str) -> str:
    """Return a text with lone surrogates as their codes: no Unicode, which Parquet asks for."""
    return text.encode("utf-8", "backslashreplace").decode()
