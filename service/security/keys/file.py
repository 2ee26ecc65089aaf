"""The file of keys, which holds their hashes only; it is read again whenever it changes.

A key is 256 random bits, so one SHA-256 of it is enough: password hashes are slow to hinder
guessing, and there is nothing to guess here.
"""

import hashlib
import hmac
import logging
import os
import time
import tomllib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from limits import RateLimitItem, parse
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from models.errors import PsimError

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the file is looked at, while there are requests."""


class KeysError(PsimError):
    """The file of keys cannot be read, or says something that it must not."""


class Scope(StrEnum):
    """What a key is good for."""

    CLASSIFY = "classify"
    METRICS = "metrics"
    ADMIN = "admin"
    CONSOLE = "console"


def _rate(given: object) -> object:
    return parse(given) if isinstance(given, str) else given


class Key(BaseModel):
    """What the file says of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: frozenset[Scope] = Field(min_length=1)
    rate: Annotated[RateLimitItem, BeforeValidator(_rate)] | None = None
    """Inputs in a time, such as `100/second`; no limit without."""
    scores: bool = True
    """Whether its holder is told of more than decisions."""


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class KeysFile(BaseModel):
    """All keys, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[Name, Key] = {}

    @model_validator(mode="after")
    def _no_key_twice(self) -> Self:
        if len({key.sha256 for key in self.keys.values()}) < len(self.keys):
            raise ValueError("a key is there under two names: revoking one would not revoke it")
        return self


def hash_of(key: str) -> str:
    """Return what the file says in place of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """Return the keys of a file, by name.

    Raises:
        KeysError: there is no such file, or it is not right.
    """
    try:
        return parse_keys(path.read_bytes().decode(), path)
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not UTF-8") from None


def parse_keys(text: str, path: Path) -> dict[str, Key]:
    """Return the keys that the text of a file names.

    Raises:
        KeysError: it is not right.
    """
    try:
        return KeysFile.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as error:
        raise KeysError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise KeysError(f"{path} is no file of keys: {where}: {first['msg']}") from None


class Keys:
    """Finds keys; a change of the file that cannot be used leaves the older keys in force.

    Raises:
        KeysError: the file cannot be used.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._state = _state(path)
        self._keys = read_keys(path)
        self._look_at = clock() + LOOK_S
        self.stale = False
        """True while older keys than those of the file are in force."""

    def find(self, key: str) -> tuple[str, Key] | None:
        """Return name and entry of a key; it takes as long whatever is wrong with the key."""
        self._look()
        given = hash_of(key)
        found = [one for one in self._keys.items() if hmac.compare_digest(one[1].sha256, given)]
        return found[0] if found else None

    def _look(self) -> None:
        """Read the file again if it has changed."""
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + LOOK_S
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._path)
        except KeysError as error:
            self.stale = True
            log.error("the keys have changed, older ones stay in force: %s", error)
        else:
            self.stale = False
            log.info("the keys have changed", extra={"keys": sorted(self._keys)})


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file; None if it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a mounted secret is a link, to be followed
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
