"""What a scan has done so far, kept in a file, so that an interrupted one goes on from there."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from torch import nn

from models.errors import DataError
from models.offline.fitting.records import installed_versions
from models.offline.io.atomic import write_whole
from models.offline.io.classifiers import run_digest

Result = TypeVar("Result")


class ScanState:
    """Remembers the steps of a scan, a line each: a killed process spoils the last line at most.

    Args:
        file: where they are kept; None keeps nothing.
        key: what the steps depend on. A file of another scan is replaced.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, file: Path | None = None, key: str = "") -> None:
        header = {"scan": key}
        lines = _read(file) if file else []
        kept = lines[1:] if lines[:1] == [header] else []
        self._file, self._part = file, ""
        self._steps: dict[str, Any] = {line["step"]: line["result"] for line in kept}
        self.started = time.monotonic() - (kept[-1]["seconds"] if kept else 0)
        """When the scan began, by `time.monotonic`, as if it had never been interrupted."""
        if file:
            # The spoilt end of a line must not precede what comes next.
            _write(file, "".join(json.dumps(line) + "\n" for line in [header, *kept]))

    @property
    def steps(self) -> int:
        """Number of steps that are remembered."""
        return len(self._steps)

    def of_part(self, name: str) -> "ScanState":
        """Return the same state for one part of the scan, whose steps are named after it."""
        part = copy.copy(self)
        part._part = f"{self._part}{name}: "
        return part

    def __contains__(self, name: str) -> bool:
        return self._part + name in self._steps

    def step(self, name: str, kind: TypeAdapter[Result], make: Callable[[], Result]) -> Result:
        """Return what `make` returned for a step, be it in an earlier run, or does now."""
        whole_name = self._part + name
        if name in self:
            return kind.validate_python(self._steps[whole_name])
        result = make()
        self._steps[whole_name] = kind.dump_python(result, mode="json")
        if self._file:
            spent = time.monotonic() - self.started
            line = {"step": whole_name, "seconds": spent, "result": self._steps[whole_name]}
            with self._file.open("a") as out:
                out.write(json.dumps(line) + "\n")
        return result

    def forget(self) -> None:
        """Remove the file, once the report is written."""
        if self._file:
            self._file.unlink(missing_ok=True)


def state_of(out: Path | None, victim: nn.Module, *settings: object) -> ScanState:
    """Return the state of a scan of a victim with these settings, whose report `out` will be."""
    if out is None:
        return ScanState()
    return ScanState(state_file(out), run_digest(victim, *settings, installed_versions()))


def state_file(out: Path) -> Path:
    """Return the file that keeps the state of a scan until its report `out` is written."""
    return out.with_name(out.name + ".state")


def _read(file: Path) -> list[Any]:
    """Return the lines of a file, up to the first that is not whole."""
    lines = []
    try:
        for line in file.read_text().splitlines():
            lines.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return lines


def _write(file: Path, text: str) -> None:
    try:
        write_whole(file, text)
    except OSError as error:
        raise DataError(
            f"{file} cannot be written: {error.strerror}; choose another --out"
        ) from error
