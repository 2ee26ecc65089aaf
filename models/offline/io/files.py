"""Files of a user's texts: which format they have, and their bytes, decompressed.

pyarrow decompresses, and reads Parquet. It is imported only then, since the image has none.
"""

import io
import shutil
import sys
import tempfile
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from models.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

JSONL, JSON, CSV, TSV, PARQUET = "JSON Lines", "JSON", "CSV", "TSV", "Parquet"
FORMATS = {
    ".jsonl": JSONL, ".ndjson": JSONL, ".json": JSON, ".csv": CSV, ".tsv": TSV, ".parquet": PARQUET
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_UTF8 = "is UTF-{0}; save it as UTF-8, for example with iconv -f UTF-{0} -t UTF-8"
UTF16, UTF32 = NOT_UTF8.format(16), NOT_UTF8.format(32)
HEADS = {
    b"\xff\xfe\0\0": UTF32,
    b"\0\0\xfe\xff": UTF32,
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
    b"\x1f\x8b": "is compressed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; let its name end in .zst",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; save its table as CSV",
    b"PAR1": "is Parquet; let its name end in .parquet",
}
"""What the first bytes of a file say of it that is no text in UTF-8."""
BUFFER = 2**20
"""Bytes that are read at once from a compressed file, or from a column of a Parquet file."""
SHOWN, SHOWN_CHARS = 20, 40
"""Names of an error message, and characters of each."""


class Format(NamedTuple):
    """How a file holds its rows."""

    kind: str
    compression: str | None

    @property
    def unit(self) -> str:
        """What a place in the file is called."""
        return "row" if self.kind == PARQUET else "line"


def format_of(file: Path) -> Format:
    """Return the format that the ending of a file's name says, in upper or lower case.

    A pipe, such as a shell's <(…), has JSON Lines.

    Raises:
        DataError: the ending is of no format that can be read.
    """
    if file.is_fifo():
        return Format(JSONL, None)
    endings = [ending.lower() for ending in file.suffixes]
    compression = COMPRESSIONS.get(endings[-1]) if endings else None
    kind = FORMATS.get(next(iter(endings[::-1][compression is not None :]), ""))
    if kind is None:
        raise DataError(
            f"{file}: unknown format; there are {', '.join(FORMATS)}, "
            f"each also with {' or '.join(COMPRESSIONS)}"
        )
    return Format(kind, compression)


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading; what is compressed is decompressed on the way.

    Raises:
        DataError: the file cannot be opened, or its name has an unknown ending.
    """
    compression = format_of(file).compression
    try:
        raw = file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    with raw:
        if compression is None:
            yield raw
        else:
            import pyarrow as pa

            stream = pa.input_stream(raw, compression=compression, buffer_size=BUFFER)
            with io.BufferedReader(stream, BUFFER) as decompressed:
                yield decompressed


@contextmanager
def opened_parquet(file: Path) -> Iterator["pq.ParquetFile"]:
    """Open a Parquet file; a compressed one is decompressed into a temporary file.

    Raises:
        DataError: it is no Parquet, or damaged. Its pages are only read later.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        source: Path | IO[bytes] = file
        if format_of(file).compression is not None:
            raw = stack.enter_context(opened(file))
            source = stack.enter_context(tempfile.TemporaryFile())
        try:
            if not isinstance(source, Path):
                shutil.copyfileobj(raw, source, BUFFER)
            parquet = stack.enter_context(pq.ParquetFile(source, buffer_size=BUFFER))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {type(error).__name__}") from error
        yield parquet


def _is_of_reading(error: Exception) -> bool:
    """Whether an error says that bytes cannot be read; pyarrow has errors of its own for that."""
    arrow = sys.modules.get("pyarrow")
    return isinstance(error, OSError) or bool(arrow and isinstance(error, arrow.ArrowException))


class Source:
    """The bytes of a text file, and how far they are read.

    Args:
        name: what errors call it.
        raw: where the bytes come from.
    """

    def __init__(self, name: str, raw: io.BufferedReader) -> None:
        self.name, self._raw = name, raw
        self.lines = 0
        """Lines that were read."""
        self.offset = 0
        """Bytes that were read."""
        self.jumped = False
        """Whether bytes were left out, so that nobody knows the lines."""
        self._begun = False

    def __iter__(self) -> Iterator[str]:
        """Yield lines. Bytes that are not UTF-8 become lone surrogates, an error of their row."""
        while line := self._read(self._raw.readline):
            self.lines += 1
            self.offset += len(line)
            yield line.decode("utf-8", "surrogateescape")

    def read(self, size: int) -> bytes:
        """Return so many bytes, or fewer at the end, and count none of them."""
        return self._read(lambda: self._raw.read(size))

    def jump(self, offset: int) -> None:
        """Go on at an offset behind what was read."""
        self.jumped = self._begun = True
        if self._raw.seekable():
            self._raw.seek(offset)
        else:  # it is decompressed from its start
            while self.offset < offset and (
                left_out := self.read(min(offset - self.offset, BUFFER))
            ):
                self.offset += len(left_out)
        self.offset = offset

    def fault(self, message: str, line: int) -> DataError:
        """Return an error that names file and line."""
        return DataError(f"{self.name}{'' if self.jumped else f', line {line}'}: {message}")

    def starts_with(self, mark: bytes) -> bool:
        """Return whether the first bytes are these, behind a byte order mark and blanks."""
        head = self._told(lambda: self._raw.peek(BUFFER))
        return head.removeprefix(BOM_UTF8).lstrip().startswith(mark)

    def _read(self, read: Callable[[], bytes]) -> bytes:
        data = self._told(read)
        if self._begun:
            return data
        self._begun = True
        return self._behind_mark(data)

    def _told(self, read: Callable[[], bytes]) -> bytes:
        """Return what was read, or raise `DataError`."""
        try:
            return read()
        except Exception as error:
            if not _is_of_reading(error):
                raise
            why = (
                getattr(error, "strerror", None) or "its compression is damaged, or it was cut off"
            )
            raise DataError(
                f"{self.name} cannot be read behind line {self.lines}: {why}"
            ) from error

    def _behind_mark(self, head: bytes) -> bytes:
        """Return the first bytes of a file without a byte order mark.

        Raises:
            DataError: they are no text in UTF-8.
        """
        if head.startswith(BOM_UTF8):
            self.offset = len(BOM_UTF8)
            return head[self.offset :]
        found = next((why for start, why in HEADS.items() if head.startswith(start)), None)
        if found is None and b"\0" in head[:2]:
            found = UTF16  # without a byte order mark
        if found is not None:
            raise DataError(f"{self.name} {found}")
        return head


def check_column(where: object, names: Iterable[str], column: str, hint: str = "") -> None:
    """Check that a table has a column of texts, once.

    Raises:
        DataError: it has not, or has several of this name; ends with the hint.
    """
    found = list(names)
    if column not in found:
        words = [name if name.split() == [name] else "…" for name in found]
        raise DataError(
            f"{where} has no column {column!r}; it has {shown(words)}; "
            f"name the right one with --text-column{hint}"
        )
    if found.count(column) > 1:
        raise DataError(f"{where} has several columns {column!r}; rename all but one")


def shown(names: Iterable[str]) -> str:
    """Return names for an error message, without those that look like texts."""
    ordered = sorted(set(names))
    short = [n if len(n) <= SHOWN_CHARS and n.isprintable() else "…" for n in ordered[:SHOWN]]
    return str(short + ["…"] * (len(ordered) > SHOWN))
