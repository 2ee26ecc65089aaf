"""Results by content: a step that was done on the same inputs is not done again."""

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

VERSIONS = {"psim": 4}
"""By kind of step, 1 where not named; part of its keys: a change of code that changes the results
of a kind raises it."""


@dataclass(frozen=True)
class Step:
    """A step that is done."""

    key: str
    """Digest of the step's kind and inputs; an input of the steps that follow."""
    folder: Path
    result: Any
    """What `make` returned, as JSON."""


@dataclass(frozen=True)
class StepCache:
    """A folder of results, each named after what it was made from.

    Several processes may share it: one at a time works on a step, and the others wait for it.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """What the steps asked for took when they were done, by kind and key."""

    def step(self, kind: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Step:
        """Return the result of `make`, from an earlier run if there is one.

        Args:
            kind: what the step does; names the folder.
            inputs: all that the result depends on.
            make: writes files into the folder it is given and returns what is kept as JSON;
                interrupted, it is called again with the same folder.
        """
        version = VERSIONS.get(kind, 1)
        content = json.dumps([version, kind, to_jsonable_python(inputs)], sort_keys=True)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        folder = self.root / kind / key
        done = folder / "result.json"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not done.exists():
                started = time.perf_counter()
                kept = {"inputs": json.loads(content), "result": to_jsonable_python(make(folder))}
                kept["seconds"] = round(time.perf_counter() - started, 1)
                write_whole(done, json.dumps(kept, indent=1))
        kept = json.loads(done.read_text(encoding="utf-8"))
        self.seconds[f"{kind}/{key}"] = kept.get("seconds", 0.0)
        return Step(key, folder, kept["result"])


def digest_of(content: object) -> str:
    """Return a digest of anything that is JSON at heart, for inputs too long to be kept."""
    text = json.dumps(to_jsonable_python(content), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Memo:
    """What a slow function from text to text has said before, kept in a file."""

    def __init__(self, path: Path, function: Callable[[str], str]) -> None:
        self._path, self._function = path, function
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known: dict[str, str] = dict(json.loads(line) for line in lines)

    def __call__(self, text: str) -> str:
        """Return what the function says of a text, asking it only once."""
        if text not in self._known:
            self._known[text] = self._function(text)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([text, self._known[text]]) + "\n")
        return self._known[text]
