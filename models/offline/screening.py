"""Screening a stream of texts: memory stays flat however long it is."""

import json
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from models.bundle import Bundle
from models.errors import DataError, PsimError
from models.offline.data import check_text
from models.offline.predict import predict

CHUNK = 512
"""Lines that are read, sorted by length and answered together."""


def screen_file(bundle: Bundle, lines: Iterable[str], out: TextIO, text_column: str) -> int:
    """Write one JSON verdict per input line, in order; return how many lines were unusable.

    A line that cannot be screened is answered with its number and an error, and never stops the
    lines behind it. Blank lines are answered too, so input and output stay aligned.
    """
    failed = 0
    for chunk in _chunks(lines):
        for answer in _screen_chunk(bundle, chunk, text_column):
            failed += "error" in answer
            out.write(json.dumps(answer) + "\n")
        out.flush()
    return failed


def split_by_verdict(bundle: Bundle, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the texts that are poisoned, and the others."""
    encodings = bundle.engine.encode(texts)
    flagged: list[str] = []
    passed: list[str] = []
    for text, readings in zip(texts, predict(bundle.engine, encodings), strict=True):
        (flagged if bundle.screen.judge(readings).poisoned else passed).append(text)
    return flagged, passed


def _chunks(lines: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield numbered lines, at most `CHUNK` at once, never waiting for more than the next one.

    A thread reads ahead while a chunk is screened, so that a slow pipe is answered line by line and
    a fast one in full batches.
    """
    waiting: queue.Queue[tuple[int, str] | BaseException | None] = queue.Queue(CHUNK)

    def read() -> None:
        try:
            for numbered in enumerate(lines, 1):
                waiting.put(numbered)
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        taken = [waiting.get()]
        while len(taken) < CHUNK and not waiting.empty():
            taken.append(waiting.get())
        if chunk := [line for line in taken if isinstance(line, tuple)]:
            yield chunk
        if isinstance(taken[-1], BaseException):
            raise taken[-1]
        if taken[-1] is None:
            return


def _screen_chunk(
    bundle: Bundle, chunk: list[tuple[int, str]], text_column: str
) -> Iterator[dict[str, Any]]:
    texts = [_text_or_error(line, text_column) for _, line in chunk]
    encodings = bundle.engine.encode([t for t in texts if isinstance(t, str)])
    rows = iter(zip(predict(bundle.engine, encodings), encodings, strict=True) if encodings else ())
    for (number, _), text in zip(chunk, texts, strict=True):
        try:
            if isinstance(text, DataError):
                raise text
            probabilities, encoding = next(rows)
            verdict = bundle.screen.judge(probabilities, encoding.truncated)
            yield {"line": number, **asdict(verdict)}
        except PsimError as error:
            yield {"line": number, "error": str(error)}


def _text_or_error(line: str, text_column: str) -> str | DataError:
    """Return the text of a JSONL line, or why there is none; the text itself is never repeated."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return DataError("not JSON")
    if not isinstance(row, dict) or text_column not in row:
        return DataError(f"no text in {text_column!r}")
    try:
        return check_text(row[text_column])
    except DataError as error:
        return error
