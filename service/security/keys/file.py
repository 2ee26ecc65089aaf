"""The file of API keys, which holds only their hashes; it is read again when it changes.

A key is 256 random bits, so one SHA-256 suffices: the slow hashes for passwords hinder guessing,
and random keys cannot be guessed.
"""

import hashlib
import hmac
import logging
import math
import os
import time
import tomllib
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

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
from service.settings import Mode

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Shortest time between two checks for changes of the file."""


class KeysError(PsimError):
    """The file of keys cannot be read, or is invalid."""


class Scope(StrEnum):
    """Routes that a key gives access to."""

    CLASSIFY = "classify"
    METRICS = "metrics"
    ADMIN = "admin"
    CONSOLE = "console"


def _rate(value: object) -> object:
    return parse(value) if isinstance(value, str) else value


ModelName = Annotated[str, StringConstraints(min_length=1)]


class Key(BaseModel):
    """A key, as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: frozenset[Scope] = Field(min_length=1)
    rate: Annotated[RateLimitItem, BeforeValidator(_rate)] | None = None
    """Inputs per time, such as `100/second`; None is no limit."""
    scores: bool = True
    """Whether the holder sees scores, not only decisions."""
    mode: Mode | None = None
    """What happens to the holder's texts; None leaves that to the service, as below."""
    unfamiliar: Literal["flag", "reject", "allow"] | None = None
    models: Annotated[frozenset[ModelName], Field(min_length=1)] | None = None
    """Names of the models that the holder may use; None is all of them."""
    frr_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The false-rejection budget that a bundle must be calibrated for; None takes any."""

    def allows(self, model: str) -> bool:
        """Return whether the key is for a model."""
        return self.models is None or model in self.models

    def holds(self, budget: float) -> bool:
        """Return whether a bundle of this false-rejection budget will do."""
        return self.frr_budget is None or math.isclose(self.frr_budget, budget)

    def fits(self, model: str, budget: float) -> bool:
        """Return whether requests with the key are answered by a model."""
        return self.allows(model) and self.holds(budget)


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
    """Return the hash that stands for a key in the file."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """Return the keys of a file, by name.

    Raises:
        KeysError: the file cannot be read, or is invalid.
    """
    try:
        return parse_keys(path.read_bytes().decode(), path)
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not UTF-8") from None


def parse_keys(text: str, path: Path) -> dict[str, Key]:
    """Return the keys in the text of a file, by name.

    Raises:
        KeysError: the text is invalid.
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
    """Finds keys; if a change of the file is invalid, the older keys stay in force.

    Raises:
        KeysError: the file is invalid at the start.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._version = _version(path)
        self._keys = read_keys(path)
        self._check_at = clock() + CHECK_S
        self.stale = False
        """Whether the keys in force are older than the file."""

    @property
    def all(self) -> Mapping[str, Key]:
        """The keys in force, by name."""
        self._reload_if_changed()
        return self._keys

    def find(self, key: str) -> tuple[str, Key] | None:
        """Return a key with its name; None if there is none. Takes constant time in the key."""
        self._reload_if_changed()
        sha256 = hash_of(key)
        found = [item for item in self._keys.items() if hmac.compare_digest(item[1].sha256, sha256)]
        return found[0] if found else None

    def _reload_if_changed(self) -> None:
        if self._clock() < self._check_at:
            return
        self._check_at = self._clock() + CHECK_S
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
        except KeysError as error:
            self.stale = True
            log.error("the keys have changed, older ones stay in force: %s", error)
        else:
            self.stale = False
            log.info("the keys have changed", extra={"keys": sorted(self._keys)})


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return values that change with a file; None if it does not exist."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - a mounted secret is a link, to be followed
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
