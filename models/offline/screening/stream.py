"""Screening of a stream of texts, in memory that does not grow with its length."""

import json
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from models.bundle.load import Bundle
from models.detection.screen import Finding, Verdict
from models.errors import DataError, PsimError
from models.offline.io.inference import judge_texts, require_verdicts
from models.offline.io.samples import CHUNK, text_of
from models.offline.io.tables import Record


def screen_file(
    bundle: Bundle,
    records: Iterable[Record],
    out: TextIO,
    text_column: str,
    *,
    unit: str = "line",
    thorough: bool | None = None,
) -> int:
    """Write one JSON verdict per input row, in order; return the number of unusable rows.

    A row that cannot be screened gets its place and an error, and the rows after it are screened
    all the same. Blank lines of JSON Lines get an error too, so input and output stay aligned.
    `unit` is the name of the field for the place.
    """
    failed = 0
    for chunk in _chunks(records):
        texts = [text_of(record.row, text_column) for record in chunk]
        for record, verdict in zip(
            chunk, screen_texts(bundle, texts, thorough=thorough), strict=True
        ):
            failed += isinstance(verdict, PsimError)
            row = {unit: record.place} | as_row(verdict, bundle.manifest.classes)
            out.write(json.dumps(row) + "\n")
        out.flush()
    return failed


def as_row(verdict: Verdict | PsimError, classes: Sequence[str]) -> dict[str, Any]:
    """Return the output fields of a text: its verdict with the bundle's classes, or the error."""
    if isinstance(verdict, PsimError):
        return {"error": str(verdict)}
    own = asdict(verdict)
    del own["suspected"]  # the p-value says more
    return own | {"predicted_class": classes[verdict.predicted], "poisoned": verdict.poisoned}


def split_by_finding(bundle: Bundle, texts: Sequence[str]) -> dict[Finding | None, list[str]]:
    """Return the texts with each finding, and those in which the bundle finds nothing."""
    encodings = bundle.engine.encode(texts)
    found: dict[Finding | None, list[str]] = {finding: [] for finding in (*Finding, None)}
    for text, verdict in zip(texts, require_verdicts(bundle, encodings), strict=True):
        found[verdict.finding].append(text)
    return found


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield rows in chunks of at most `CHUNK`, without waiting for a chunk to fill.

    A thread reads ahead while a chunk is screened, so that a slow pipe is answered line by line and
    a fast one in full batches.
    """
    pending: queue.Queue[Record | BaseException | None] = queue.Queue(CHUNK)

    def read() -> None:
        try:
            for record in records:
                pending.put(record)
            pending.put(None)
        except BaseException as error:
            pending.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        taken = [pending.get()]
        while len(taken) < CHUNK and not pending.empty():
            taken.append(pending.get())
        if chunk := [record for record in taken if isinstance(record, Record)]:
            yield chunk
        if isinstance(taken[-1], BaseException):
            raise taken[-1]
        if taken[-1] is None:
            return


def screen_texts(
    bundle: Bundle, texts: Sequence[str | DataError], *, thorough: bool | None = None
) -> Iterator[Verdict | PsimError]:
    """Yield the verdict on each text, or the error that prevents it.

    All texts are batched together by length. An error in place of a text is yielded as it is.
    """
    encodings = bundle.engine.encode([t for t in texts if isinstance(t, str)])
    verdicts = iter(judge_texts(bundle, encodings, thorough=thorough))
    for text in texts:
        yield text if isinstance(text, DataError) else next(verdicts)
