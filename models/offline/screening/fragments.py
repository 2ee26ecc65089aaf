"""Large tables as fragments: runs of rows that can be read independently, in small chunks.

The footer of a Parquet file tells where its rows are. A text file is read once from end to end to
find their offsets, with the same parser that reads its fragments later.
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
"""Bytes that are read at once from a column of a Parquet file."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (".parquet", ".jsonl", *SEPARATORS)
BROKEN = (pa.ArrowException, csv.Error, ValueError, OSError)
"""Exceptions that the parsers raise. Their messages may quote a text."""
COLUMN_PREFIX = "psim_"
"""Prefix of the columns that screening adds."""

csv.field_size_limit(2**24)  # a longer field lacks its closing quotation mark


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of rows of one file."""

    file: str
    number: int
    """Index in its file, from 0."""
    row: int
    """Number of its first row in the file, from 1. Every line of JSONL counts, a CSV header not."""
    rows: int
    offset: int = 0
    """Byte offset of its first row in a text file."""

    def __str__(self) -> str:
        return f"{self.file}, rows {self.row} to {self.row + self.rows - 1}"


class Chunk(NamedTuple):
    """Some rows of a fragment."""

    texts: list[str | DataError]
    """The text of each row, or the reason why it has none."""
    columns: dict[str, pa.Array]


def fragments_of(file: Path, text_column: str, rows: int) -> list[Fragment]:
    """Divide a file into fragments of `rows` rows; the last fragment may have fewer.

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
        DataError: the file cannot be read, or has changed since it was divided.
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
    """Return the columns of a fragment.

    Columns of text files are strings. JSONL has a column for every key that occurs in the fragment,
    except keys that begin with `COLUMN_PREFIX`.

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
                names = sorted(key for key in found if not key.startswith(COLUMN_PREFIX))
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
    if any(name.startswith(COLUMN_PREFIX) for name in names):
        raise DataError(
            f"{file} has columns {COLUMN_PREFIX}…, as what was screened already; rename them"
        )


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
        groups = range(opened.num_row_groups)
        ends = list(accumulate(opened.metadata.row_group(i).num_rows for i in groups))
        first, last = bisect_right(ends, start), bisect_left(ends, start + left)
        # Rows before the fragment in its row group are decoded and dropped, which costs little.
        skip = start - (ends[first - 1] if first else 0)
        for batch in opened.iter_batches(CHUNK, row_groups=list(groups[first : last + 1])):
            rows = batch.slice(min(skip, batch.num_rows), left)
            skip -= min(skip, batch.num_rows)
            left -= rows.num_rows
            texts = [text_of({text_column: t}, text_column) for t in rows[text_column].to_pylist()]
            yield Chunk(texts, dict(zip(rows.schema.names, rows.columns, strict=True)))


def _text_chunks(file: Path, fragment: Fragment, text_column: str) -> Iterator[Chunk]:
    names, left = schema_of(fragment).names, fragment.rows
    with _opened(file, fragment.offset) as raw:
        records = _records(file, raw)
        while chunk := list(islice(records, min(CHUNK, left))):
            left -= len(chunk)
            rows = [_row(record, names) for record in chunk]
            columns = {name: [_string(row, name) for row in rows] for name in names}
            arrays = {name: pa.array(column, pa.string()) for name, column in columns.items()}
            yield Chunk([text_of(row, text_column) for row in rows], arrays)


@contextmanager
def _opened(file: Path, offset: int = 0) -> Iterator[BinaryIO]:
    """Open a text file at an offset, or behind its byte order mark."""
    with file.open("rb") as raw:
        if raw.read(len(BOM_UTF8)) != BOM_UTF8:
            raw.seek(0)
        if offset:
            raw.seek(offset)
        yield raw


def _lines(raw: BinaryIO) -> Iterator[str]:
    """Yield lines; bytes that are not UTF-8 become lone surrogates, an error of their row."""
    return (line.decode("utf-8", "surrogateescape") for line in raw)


def _records(file: Path, raw: BinaryIO) -> Iterator[Any]:
    """Yield the lines of JSONL or the records of CSV."""
    if file.suffix == ".jsonl":
        return _lines(raw)
    return (
        record for record in csv.reader(_lines(raw), delimiter=SEPARATORS[file.suffix]) if record
    )


def _row(record: Any, names: Sequence[str]) -> Row | DataError:
    """Return a row by column, or the reason why it cannot be read."""
    if isinstance(record, str):
        return _json_row(record)
    if len(record) != len(names):
        return DataError(f"the row has {len(record)} fields, the header {len(names)}")
    return dict(zip(names, record, strict=True))


def _json_row(line: str) -> Row | DataError:
    row = json_row(line)
    return row if isinstance(row, DataError) else {_valid(key): row[key] for key in row}


def _string(row: Row | DataError, name: str) -> str | None:
    """Return a value as a string; values that are no strings are written as JSON."""
    value = None if isinstance(row, DataError) else row.get(name)
    if value is None or isinstance(value, str):
        return value and _valid(value)
    return json.dumps(value)


def _valid(text: str) -> str:
    """Return a text with lone surrogates as escapes, since Parquet accepts only valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()
