"""A cache of results by content: a step with the same inputs is not done twice."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic_core import to_jsonable_python

from models.offline.io.atomic import write_whole

VERSIONS = {"psim": 7, "bundle": 13, "verdicts": 8, "scan": 8}
"""Version of each kind of step, 1 if not listed. It is part of a step's key. Raise it with a change
of code that changes the results of that kind."""


def is_current(row: Mapping[str, Any]) -> bool:
    """Return whether the row of a cell is of this version of everything that it holds."""
    return all(VERSIONS.get(kind) == version for kind, version in row["versions"].items())


@dataclass(frozen=True)
class Step:
    """A finished step."""

    key: str
    """Digest of the step's kind and inputs. Steps that build on this one have it as an input."""
    folder: Path
    result: Any
    """Result of `make`, as JSON."""


@dataclass(frozen=True)
class StepCache:
    """A folder of results, named by digests of their inputs.

    Several processes may share it. One at a time works on a step, and the others wait.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each requested step at the time it was done, by kind and key."""

    def step(self, kind: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Step:
        """Return a step with the result of `make`, from an earlier run if there is one.

        Args:
            kind: kind of work; names the folder.
            inputs: everything that the result depends on.
            make: function that writes files into the given folder and returns a JSON-like result.
                After an interruption, it is called again with the same folder.
        """
        version = VERSIONS.get(kind, 1)
        content = json.dumps([version, kind, to_jsonable_python(inputs)], sort_keys=True)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        folder = self.root / kind / key
        file = folder / "result.json"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not file.exists():
                started = time.perf_counter()
                record = {"inputs": json.loads(content), "result": to_jsonable_python(make(folder))}
                record["seconds"] = round(time.perf_counter() - started, 1)
                write_whole(file, json.dumps(record, indent=1))
        record = json.loads(file.read_text(encoding="utf-8"))
        self.seconds[f"{kind}/{key}"] = record.get("seconds", 0.0)
        return Step(key, folder, record["result"])


def digest_of(content: object) -> str:
    """Return a digest of a JSON-like value, for inputs that are too long to be stored."""
    text = json.dumps(to_jsonable_python(content), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class MemoizedFunction:
    """A slow function from text to text, with its results kept in a file."""

    def __init__(self, path: Path, function: Callable[[str], str]) -> None:
        self._path, self._function = path, function
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._results: dict[str, str] = dict(json.loads(line) for line in lines)

    def __call__(self, text: str) -> str:
        """Return the result for a text; the function is called once per text."""
        if text not in self._results:
            self._results[text] = self._function(text)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([text, self._results[text]]) + "\n")
        return self._results[text]
