"""Checks of a bundle's files. They run before any library reads one of them.

Hashes prove that a bundle is what its maker wrote. The other checks make sure that reading it runs
no code, follows no path out of the folder, and takes no more memory than there is.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

import psutil
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.bundle.digests import file_digest
from models.bundle.files import MAX_FILE_BYTES, private_copy, read_small
from models.bundle.layout import (
    ALLOWED,
    CARRIERS,
    MANIFEST,
    PICKLES,
    PROMPT,
    REQUIRED,
    SIGNATURE,
    WEIGHT_INDEX,
)
from models.bundle.manifest import Manifest
from models.bundle.signing import check_signature
from models.errors import BundleError

CGROUP = Path("/sys/fs/cgroup")
WEIGHTS = ".safetensors"
VOCABULARIES = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/added_tokens.json")
"""Files whose keys are words of a language, not settings."""
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT's other types import modules, or load weights, that the settings name."""
CODE_SETTINGS = (
    "auto_map",
    "*attn_implementation",
    "*experts_implementation",
    "quantization_config",
)
"""Settings that name code: in the bundle, on the Hub, or in packages we do not depend on."""
PATH_SETTINGS = ("*_file", "*_files", "init_inputs", "transformers_weights")
"""Settings that name a file."""


class WeightTotals(NamedTuple):
    """Totals over all weights of a bundle, which bound the model that may be built from it."""

    tensors: int
    numbers: int

    @contextmanager
    def limit_modules(self) -> Iterator[None]:
        """Raise `BundleError` once modules register more parameters than there are tensors."""
        registered = 0

        def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
            nonlocal registered
            registered += 1
            # Tied and wrapped parameters are registered twice.
            if registered > 2 * self.tensors:
                raise BundleError(f"the model has more layers than there are weights for, {self}")

        hook = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def check(self, model: nn.Module) -> None:
        """Raise `BundleError` if a model on the meta device needs more numbers than there are."""
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        # Buffers, such as position ids, are not always saved.
        if needed > 2 * self.numbers:
            raise BundleError(f"the model has {needed} numbers, but there are weights for {self}")

    def __str__(self) -> str:
        return f"{self.numbers} in {self.tensors} tensors"


def read_manifest(path: Path, key: Path | None = None) -> tuple[Manifest, str]:
    """Return the manifest of the bundle at `path` and its SHA-256.

    Args:
        path: folder of the bundle.
        key: file of the public key that the manifest must be signed with; None skips the check.

    Raises:
        BundleError: there is no valid manifest, or no valid signature.
        PsimError: there is no such key.
    """
    try:
        raw = read_small(path / MANIFEST)
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: cannot read {MANIFEST}") from error
    if key is not None:
        check_signature(raw, path / SIGNATURE, key)
    try:
        return Manifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        if where == "schema_version":
            raise BundleError(_other_version(path, error.errors()[0]["input"])) from None
        raise BundleError(f"{path}/{MANIFEST} is not valid: {where!r}: {first['msg']}") from error


def _other_version(path: Path, found: object) -> str:
    (known,) = get_args(Manifest.model_fields["schema_version"].annotation)
    schema = f"schema {found}" if isinstance(found, int) and 0 <= found < 1000 else "no schema"
    return (
        f"{path} has {schema} instead of {known}, so it is of another version; run `psim fit` "
        "again: psim fit --victim VICTIM --texts CLEAN --out BUNDLE. Or serve it with the version "
        "that wrote it (docs/upgrading.md)"
    )


def check_files(path: Path, manifest: Manifest) -> None:
    """Check every file of the bundle at `path` where it is, for commands that load nothing.

    Raises:
        BundleError: the folder does not hold exactly the manifest's files, unaltered; or one of
            them is too large, malformed, or has settings that a bundle may not have.
    """
    try:
        _check(_listed_files(path, manifest), manifest)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


@contextmanager
def checked_copy(path: Path, manifest: Manifest) -> Iterator[tuple[Path, WeightTotals]]:
    """Yield a private copy of the bundle at `path`, all of it checked, and totals of its weights.

    Raises:
        BundleError: see `check_files`; or there is no memory for the copy.
    """
    sizes = {name: file.lstat().st_size for name, file in _listed_files(path, manifest).items()}
    if (total := sum(sizes.values())) > (free := free_memory()):
        raise BundleError(f"its files have {total} bytes, more than the {free} of free memory")
    with private_copy(path, sizes) as copy:
        yield copy, _check({name: copy / name for name in sizes}, manifest)


def free_memory() -> int:
    """Return how many bytes are free: of the machine, and of the container's limit."""
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no cgroup of version 2, or no limit
        return free
    cached = sum(int(line.split()[1]) for line in lines if re.match("(in)?active_file ", line))
    return min(free, limit - used + cached)


def _check(files: Mapping[str, Path], manifest: Manifest) -> WeightTotals:
    _check_sizes(files)
    _check_hashes(files, manifest)
    return _check_contents(files, len(manifest.labels))


def _listed_files(path: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the manifest's files by name; opens none of them."""
    try:
        inside = {str(PurePosixPath(f.relative_to(path))): f for f in path.rglob("*")}
    except RecursionError:
        raise BundleError("folders are nested too deeply") from None
    if any(file.is_symlink() for file in inside.values()):
        raise BundleError("a bundle may not contain symbolic links")
    found = {name for name, file in inside.items() if not file.is_dir()}
    found -= {MANIFEST, SIGNATURE}
    for name in sorted(found):
        if inside[name].suffix in PICKLES:
            raise BundleError(f"{name!r} is a pickle, which can run code; use safetensors")
        allowed = any(fnmatchcase(name, pattern) for pattern in ALLOWED) and name.count("/") < 2
        if not allowed or not inside[name].is_file() or name not in manifest.files:
            raise BundleError(f"{name!r} does not belong in a bundle; remove it")
    if CARRIERS in found and manifest.override is None:
        raise BundleError(f"{CARRIERS!r} does not belong in a bundle without an override test")
    prompt = PROMPT if found & {*PROMPT} else ()
    carriers = (CARRIERS,) if manifest.override else ()
    for name in (*REQUIRED, *prompt, *carriers, *manifest.files):
        if name not in found:
            raise BundleError(f"{name!r} is missing; copy or build the bundle again")
    return {name: inside[name] for name in manifest.files}


def _check_sizes(files: Mapping[str, Path]) -> None:
    for name, file in files.items():
        size = file.stat().st_size
        if size > MAX_FILE_BYTES and not name.endswith(WEIGHTS):
            raise BundleError(f"{name} has {size} bytes, more than {MAX_FILE_BYTES}")


def _check_hashes(files: Mapping[str, Path], manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        try:
            actual = file_digest(files[name])
        except OSError as error:
            raise BundleError(f"{name} cannot be read: {error.strerror}") from error
        if actual != expected:
            raise BundleError(f"{name} was altered: its SHA-256 is not the manifest's")


def _check_contents(files: Mapping[str, Path], classes: int) -> WeightTotals:
    totals = _weight_totals({n: file for n, file in files.items() if n.endswith(WEIGHTS)})
    for name, file in files.items():
        if name.endswith(".json") and name not in VOCABULARIES:
            settings = _parse(name, file)
            if name == WEIGHT_INDEX:
                _check_index(settings, files)
            else:
                _check_settings(name, settings, max(totals.tensors, classes))
    return totals


def _weight_totals(files: Mapping[str, Path]) -> WeightTotals:
    """Read the headers of all safetensors; the library checks that they agree with the sizes."""
    tensors = numbers = 0
    for name, file in files.items():
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    tensors += 1
                    count = 1
                    for size in opened.get_slice(key).get_shape():
                        count *= size
                    numbers += count
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"{name} is not a file of safetensors") from error
    return WeightTotals(tensors, numbers)


def _parse(name: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise BundleError(f"{name} is not JSON, or nested too deeply") from None
    if not isinstance(settings, dict):
        raise BundleError(f"{name} is not an object of JSON")
    return settings


def _check_index(settings: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    shards = settings.get("weight_map")
    if not isinstance(shards, dict) or not all(f"victim/{s}" in files for s in shards.values()):
        raise BundleError(f"{WEIGHT_INDEX} names files that the bundle does not have")


def _check_settings(name: str, settings: Mapping[str, Any], limit: int) -> None:
    if name.startswith("prompt/") and settings.get("peft_type") not in PROMPT_TYPES:
        raise BundleError(f"{name}: the type of a prompt must be one of {', '.join(PROMPT_TYPES)}")
    for key, value in _all_settings(settings):
        if value and any(fnmatchcase(key, pattern) for pattern in CODE_SETTINGS):
            raise BundleError(f"{name}: {key!r} asks for code that is not ours; remove it")
        if value and any(fnmatchcase(key, pattern) for pattern in PATH_SETTINGS):
            raise BundleError(f"{name}: {key!r} leads to another file; remove it")
        # Libraries allocate lists of these lengths before they build anything.
        if ("layer" in key or "label" in key) and isinstance(value, int) and value > limit:
            raise BundleError(
                f"{name}: {key!r} is {value}, but the weights are for {limit} at most"
            )


def _all_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values at any depth, except below `label2id`, whose keys are classes."""
    pending: list[Any] = [settings]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield from node.items()
            pending += [value for key, value in node.items() if key != "label2id"]
        elif isinstance(node, list):
            pending += node
