"""Reading and writing texts and labels in common formats."""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.errors import DataError

MAX_CHARS = 100_000
"""Limit for a text; a longer one is a mistake or an attack."""

CHUNK = 512
"""Rows that are read, sorted by length and screened together, if there are too many to hold."""

SEPARATOR, NO_LABELS = "|", "[]"
"""Between the labels of a text of a multi-label task, and in place of them if none is on."""
HUB_PREFIX = "hf://"
Row = dict[str, Any]


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
    label_column: str = "label",
    drop_empty: bool = False,
) -> list[Sample]:
    """Read texts, and labels where there are any.

    Args:
        source: a .jsonl, .csv, .tsv or .parquet file, a folder that `datasets` saved, or
            `hf://name` / `hf://name:split` for a data set of the hub.
        text_column: column of the texts.
        label_column: column of the labels; need not exist.
        drop_empty: leave out rows without a text, instead of refusing the file.

    Raises:
        DataError: names the problem and the row; never quotes the text.
    """
    frame = _read(source)
    if text_column not in frame.columns:
        raise DataError(
            f"{source} has no column {text_column!r}; it has {sorted(map(str, frame.columns))}; "
            "name the right one with --text-column"
        )
    if frame.empty:
        raise DataError(f"{source} is empty; give a file with texts")
    labels = frame[label_column] if label_column in frame.columns else [None] * len(frame)
    samples = [
        Sample(_checked(text, source, row), _label(label))
        for row, (text, label) in enumerate(zip(frame[text_column], labels, strict=True), 1)
        if not (drop_empty and isinstance(text, str) and not text.strip())
    ]
    if not samples:
        raise DataError(f"{source} is empty; give a file with texts")
    return samples


def joined_labels(labels: Iterable[object]) -> str:
    """Return the labels of a text in one string, as CSV files have them: `a|b`, `[]` for none."""
    return SEPARATOR.join(map(str, labels)) or NO_LABELS


def split_labels(label: str) -> set[str]:
    """Return the labels that `joined_labels` has joined."""
    return set() if label == NO_LABELS else {*label.split(SEPARATOR)}


def _label(value: object) -> str | None:
    """Return a label's name; empty and missing ones are None, and 1.0 is the class 1."""
    if isinstance(value, list | tuple | np.ndarray):
        return joined_labels(value)
    if value is None or value == "" or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _checked(text: object, source: str, row: int) -> str:
    try:
        return check_text(text)
    except DataError as error:
        raise DataError(f"{source}, row {row}: {error}") from None


def check_text(text: object) -> str:
    """Return `text` if it can be screened; else raise `DataError`, which never quotes it."""
    if not isinstance(text, str):
        raise DataError(f"the text is {type(text).__name__}, not a string")
    if not text.strip():
        raise DataError("the text is empty")
    if len(text) > MAX_CHARS:
        raise DataError(f"the text has {len(text)} characters; the limit is {MAX_CHARS}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the text is not valid Unicode: it has a lone surrogate") from None
    return text


def json_row(line: str) -> Row | DataError:
    """Return the object on a line of JSONL, or an error if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return DataError("not JSON")
    return row if isinstance(row, dict) else {}


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


def _read(source: str) -> pd.DataFrame:
    if source.startswith(HUB_PREFIX):
        return _read_hub(source.removeprefix(HUB_PREFIX))
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist")
    if path.is_dir():
        return _read_saved_dataset(path)
    try:
        match path.suffix:
            case ".jsonl" | ".json":
                return _read_jsonl(path)
            case ".csv" | ".tsv":
                separator = "," if path.suffix == ".csv" else "\t"
                # Without this the texts "null" and "NA" would be missing values.
                with warnings.catch_warnings():
                    # More fields than columns: pandas would shift or drop them.
                    warnings.simplefilter("error", pd.errors.ParserWarning)
                    return pd.read_csv(
                        path, sep=separator, dtype=str, keep_default_na=False, index_col=False
                    )
            case ".parquet":
                return pd.read_parquet(path)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{source} is empty; give a file with texts") from error
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise DataError(f"{source} cannot be read as {path.suffix}: {_kind(error)}") from error
    raise DataError(f"{source}: unknown format; there are .jsonl, .csv, .tsv and .parquet")


def _kind(error: Exception) -> str:
    """Return the kind of an error without its message, which may quote the text."""
    return str(error) if isinstance(error, DataError) else type(error).__name__


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty; give a file with texts")
    return pd.DataFrame(rows, dtype=object)


def _read_saved_dataset(path: Path) -> pd.DataFrame:
    import datasets

    try:
        return _frame(datasets.load_from_disk(str(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path} is a folder, but not one that `datasets` has saved") from error


def _read_hub(name: str) -> pd.DataFrame:
    import datasets

    name, _, split = name.partition(":")
    try:
        return _frame(datasets.load_dataset(name, split=split or "train"))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data set {name} cannot be loaded: {type(error).__name__}") from error


def _frame(dataset: object) -> pd.DataFrame:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise DataError("the data set has several splits; name one")
    frame: pd.DataFrame = dataset.to_pandas()
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            # Unlabelled splits have -1, or nothing at all.
            frame[column] = [
                None if pd.isna(i) or i < 0 else feature.int2str(int(i)) for i in frame[column]
            ]
    return frame


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
        raise DataError(f"unknown labels {unknown}; the model has {list(known)}")
    if len(labels) < 2:
        raise DataError(f"all texts have the same label, {labels}; a classifier needs two or more")
    return labels
