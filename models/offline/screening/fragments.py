"""Large tables as fragments: runs of rows that can be read independently, in small chunks.

The footer of a Parquet file tells where its rows are. A text file is read once from end to end to
find their offsets, with the same parser that reads its fragments later. In a compressed one, what
is before a fragment is decompressed and dropped, which costs little beside screening.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from models.errors import DataError
from models.offline.io.files import PARQUET, check_column, format_of, opened_parquet, shown
from models.offline.io.samples import CHUNK, text_of
from models.offline.io.tables import Row, open_table

BROKEN = (pa.ArrowException, ValueError, OSError)
"""Exceptions that the reader of Parquet raises. Their messages may quote a text."""
COLUMN_PREFIX = "psim_"
"""Prefix of the columns that screening adds."""


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
    """Where its first row begins in a text file, in bytes; in a compressed one, decompressed."""

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
    _check_columns(file, text_column)
    counts = _parquet_counts if _is_parquet(file) else _text_counts
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
    chunks = _parquet_chunks if _is_parquet(file) else _text_chunks
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
    if _is_parquet(file):
        with opened_parquet(file) as parquet:
            return parquet.schema_arrow.remove_metadata()
    with open_table(file, fragment.offset) as table:
        names = table.names
        if names is None:
            rows = (_with_valid_keys(record.row) for record in islice(table, fragment.rows))
            found = {key for row in rows if isinstance(row, dict) for key in row}
            names = sorted(key for key in found if not key.startswith(COLUMN_PREFIX))
    return pa.schema([(name, pa.string()) for name in names])


def _unreadable(file: Path, error: Exception, row: int) -> DataError:
    return DataError(f"{file} cannot be read as Parquet behind row {row}: {type(error).__name__}")


def _is_parquet(file: Path) -> bool:
    return format_of(file).kind == PARQUET


def _check_columns(file: Path, text_column: str) -> None:
    """Check the columns of a file that has the same ones in every row."""
    if _is_parquet(file):
        names = schema_of(Fragment(str(file), 0, 1, 0)).names
        check_column(file, names, text_column)
    else:
        with open_table(file) as table:
            table.check_column(text_column)
            names = table.names or []
    if len(set(names)) < len(names):
        raise DataError(f"{file} has several columns of one name: {shown(names)}")
    if any(name.startswith(COLUMN_PREFIX) for name in names):
        raise DataError(
            f"{file} has columns {COLUMN_PREFIX}…, as what was screened already; rename them"
        )


def _parquet_counts(file: Path, rows: int) -> Iterator[tuple[int, int]]:
    with opened_parquet(file) as parquet:
        total = parquet.metadata.num_rows
    for start in range(0, total, rows):
        yield 0, min(rows, total - start)


def _text_counts(file: Path, rows: int) -> Iterator[tuple[int, int]]:
    number = 0
    with open_table(file) as table:
        offset = table.offset
        for number, _ in enumerate(table, 1):
            if number % rows == 0:
                yield offset, rows
                offset = table.offset
    if number % rows:
        yield offset, number % rows


def _parquet_chunks(file: Path, fragment: Fragment, text_column: str) -> Iterator[Chunk]:
    start, left = fragment.row - 1, fragment.rows
    with opened_parquet(file) as opened:
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
    with open_table(file, fragment.offset) as table:
        records = iter(table)
        while chunk := list(islice(records, min(CHUNK, left))):
            left -= len(chunk)
            rows = [_with_valid_keys(record.row) for record in chunk]
            columns = {name: [_string(row, name) for row in rows] for name in names}
            arrays = {name: pa.array(column, pa.string()) for name, column in columns.items()}
            yield Chunk([text_of(row, text_column) for row in rows], arrays)


def _with_valid_keys(row: Row | DataError) -> Row | DataError:
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
