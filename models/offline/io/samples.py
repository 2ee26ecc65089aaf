"""Texts and labels of a user's files and data sets."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import DataError
from models.offline.io.files import (
    JSONL,
    PARQUET,
    Source,
    check_column,
    format_of,
    opened_parquet,
    shown,
)
from models.offline.io.tables import Record, Row, TextTable, open_table
from models.texts import check_text, is_unicode

CHUNK = 512
"""Rows that are read, sorted by length and screened together, if there are too many to hold."""

SEPARATOR, NO_LABELS = "|", "[]"
"""Between the labels of a text of a multi-label task, and in place of them if none is on."""
HUB_PREFIX = "hf://"
INTEGER = re.compile(r"(-?\d+)(?:\.0+)?")


@dataclass(frozen=True, slots=True)
class Sample:
    """One text and, where it is known, its label."""

    text: str
    label: str | None = None
    """Of a multi-label task, the labels that are on, as in `joined_labels`."""


def load_samples(
    source: str,
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    drop_empty: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> list[Sample]:
    """Read texts, and labels where there are any.

    Args:
        source: a file of any format that `read_rows` reads, a folder that `datasets` saved, or
            `hf://name` / `hf://name:split` for a data set of the hub.
        text_column: column of the texts.
        label_column: column of the labels; need not exist. None reads no labels.
        drop_empty: leave out rows without a text, instead of refusing the file.
        say: called with the number of rows that were left out, if there are any.

    Raises:
        DataError: names the problem and the line or row; never quotes the text.
    """
    unit, rows = _rows(source, [text_column, *([label_column] if label_column else [])])
    samples: list[Sample] = []
    empty: list[int] = []
    for place, row, _ in rows:
        try:
            if not (samples or empty or isinstance(row, DataError)):
                check_column("the row", row, text_column)
            sample = _sample(row, text_column, label_column)
        except DataError as error:
            raise DataError(f"{source}, {unit} {place}: {error}") from None
        if sample is None:
            empty.append(place)
        else:
            samples.append(sample)
    _report_empty(source, unit, empty, len(samples), say, drop=drop_empty)
    if not samples:
        raise DataError(f"{source} is empty; give a file with texts")
    return _with_integers(samples)


def _sample(row: Row | DataError, text_column: str, label_column: str | None) -> Sample | None:
    """Return the sample in a row, or None if its text is empty or missing."""
    if isinstance(row, DataError):
        raise row
    if _is_empty(row.get(text_column)):
        return None
    label = _label(row.get(label_column)) if label_column is not None else None
    return Sample(check_text(row[text_column]), label)


def _report_empty(
    source: str,
    unit: str,
    empty: Sequence[int],
    texts: int,
    say: Callable[[str], object],
    *,
    drop: bool,
) -> None:
    """Say how many rows have no text, or raise `DataError`."""
    if not empty:
        return
    found = f"{source}: {len(empty)} of {len(empty) + texts} texts are empty or missing"
    if not drop:
        raise DataError(f"{found}, the first in {unit} {empty[0]}; remove these rows")
    say(f"{found} and left out, the first in {unit} {empty[0]}")


def _is_empty(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def joined_labels(labels: Iterable[object]) -> str:
    """Return the labels of a text in one string, as CSV files have them: `a|b`, `[]` for none."""
    return SEPARATOR.join(map(str, labels)) or NO_LABELS


def split_labels(label: str) -> set[str]:
    """Return the labels that `joined_labels` has joined."""
    return set() if label == NO_LABELS else {*label.split(SEPARATOR)}


def _label(value: object) -> str | None:
    """Return a label's name; empty and missing ones are None, several are joined.

    Raises:
        DataError: it is neither a name nor a number, nor a list of names.
    """
    if isinstance(value, list) and all(isinstance(one, str | int) for one in value):
        return joined_labels(value)
    if _is_empty(value):
        return None
    if isinstance(value, list | dict | bytes):
        raise DataError(f"the label is {type(value).__name__}, not a name or a number")
    if isinstance(value, str) and not is_unicode(value):
        raise DataError("the label is not valid Unicode")
    return str(value)


def _with_integers(samples: list[Sample]) -> list[Sample]:
    """Return 1.0 as 1 if all labels are whole numbers: tables with gaps have them as decimals."""
    matches = {s.label: INTEGER.fullmatch(s.label) for s in samples if s.label is not None}
    whole = {label: match[1] for label, match in matches.items() if match}
    if len(whole) < len(matches) or all(label == number for label, number in whole.items()):
        return samples
    return [s if s.label is None else Sample(s.text, whole[s.label]) for s in samples]


def text_of(row: Row | DataError, column: str) -> str | DataError:
    """Return a row's text, or an error if there is none, which never quotes it."""
    if isinstance(row, DataError):
        return row
    if column not in row:
        return DataError(f"no text in {column!r}")
    try:
        return check_text(row[column])
    except DataError as error:
        return error


def read_rows(file: Path, text_column: str, others: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the rows of a file: JSON Lines, JSON array, CSV, TSV or Parquet, also compressed.

    It may be of any size. Rows of Parquet only have the columns that were asked for.

    Args:
        file: the file, whose ending says the format.
        text_column: column that has to be there.
        others: further columns to read, if there are any.

    Raises:
        DataError: the file cannot be read, or lacks the column; names the line, if there is one.
    """
    if format_of(file).kind == PARQUET:
        yield from _parquet_rows(file, text_column, others)
        return
    with open_table(file) as table:
        table.check_column(text_column)
        yield from table


def read_lines(name: str, raw: io.BufferedReader) -> Iterator[Record]:
    """Yield the rows of a stream of JSON Lines; errors call it by `name`."""
    yield from TextTable(Source(name, raw), JSONL)


def _parquet_rows(file: Path, text_column: str, others: Sequence[str]) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    with opened_parquet(file) as table:
        names = table.schema_arrow.names
        check_column(file, names, text_column)
        columns = [text_column, *(name for name in others if names.count(name) == 1)]
        try:
            for batch in table.iter_batches(CHUNK, columns=columns):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    yield Record(number, row)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{file} cannot be read as Parquet behind row {number}: {type(error).__name__}"
            ) from error


def _rows(source: str, columns: Sequence[str]) -> tuple[str, Iterable[Record]]:
    """Return what a place in a source is called, and its rows without blank lines."""
    if source.startswith(HUB_PREFIX):
        return "row", _read_hub(source.removeprefix(HUB_PREFIX), columns)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist")
    if path.is_dir():
        return "row", _read_saved_dataset(path, columns)
    rows = read_rows(path, columns[0], columns[1:])
    return format_of(path).unit, (record for record in rows if not record.is_blank)


def _read_saved_dataset(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    import datasets

    try:
        return _dataset_rows(str(path), datasets.load_from_disk(str(path)), columns)
    except FileNotFoundError as error:
        raise DataError(f"{path} is a folder, but not one that `datasets` has saved") from error


def _read_hub(name: str, columns: Sequence[str]) -> Iterator[Record]:
    import datasets

    name, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data set {name} cannot be loaded: {type(error).__name__}") from error
    return _dataset_rows(name, loaded, columns)


def _dataset_rows(name: str, dataset: Any, columns: Sequence[str]) -> Iterator[Record]:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise DataError("the data set has several splits; name one")
    check_column(name, dataset.column_names, columns[0])
    present = [column for column in columns if column in dataset.column_names]
    classes = {
        column: feature
        for column, feature in dataset.features.items()
        if column in present and isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(dataset.select_columns(present), 1):
        for column, feature in classes.items():
            # Unlabelled splits have -1, or nothing at all.
            known = row[column] is not None and row[column] >= 0
            row[column] = feature.int2str(row[column]) if known else None
        yield Record(number, row)


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write JSON Lines in UTF-8, without labels that are None."""
    with path.open("w", encoding="utf-8") as out:
        for sample in samples:
            row = {"text": sample.text} | ({"label": sample.label} if sample.label else {})
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def require_labels(samples: Sequence[Sample], known: Sequence[str] | None = None) -> list[str]:
    """Return the distinct labels in order of name; every sample needs one.

    Raises:
        DataError: a sample has no label or one that is not `known`, or all have the same.
    """
    missing = sum(sample.label is None for sample in samples)
    if missing:
        raise DataError(f"{missing} of {len(samples)} texts have no label; every one needs one")
    labels = sorted({str(sample.label) for sample in samples})
    if known is not None and (unknown := sorted(set(labels) - set(known))):
        raise DataError(f"unknown labels {shown(unknown)}; the model has {list(known)}")
    if len(labels) < 2:
        raise DataError(f"all texts have the same label, {labels}; a classifier needs two or more")
    return labels


def name_classes(samples: Sequence[Sample], classes: Sequence[str]) -> list[Sample]:
    """Return samples with the names of a model's classes, where labels are their numbers.

    A label that is the name of a class stays, even if it is a number.
    """
    return [
        s if s.label is None else replace(s, label=class_name(s.label, classes)) for s in samples
    ]


def class_name(label: str, classes: Sequence[str]) -> str:
    """Return the name of a class that is known by name or by number; other labels as they are."""
    if label in classes or not re.fullmatch("[0-9]{1,9}", label):
        return label
    return classes[int(label)] if int(label) < len(classes) else label
