"""What a bundle's files would have libraries do, checked before one of them reads a file.

Hashes say that a bundle is as somebody made it. This says that to read it runs no code, leads to no
other file, and takes no more memory than there is.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.errors import BundleError

MOST = 64 * 2**20
"""Bytes of a file that is read as a whole. The largest in use are vocabularies of 35 MB."""
WEIGHTS = ".safetensors"
INDEX = "victim/model.safetensors.index.json"
VOCABULARIES = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/added_tokens.json")
"""Keys are words in them, and mean nothing."""
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT's other types import modules, and load weights, that the settings name."""
FOREIGN = ("auto_map", "*attn_implementation", "*experts_implementation", "quantization_config")
"""Settings that name code: of the bundle, of the Hub, or of packages that we do not depend on."""
ELSEWHERE = ("*_file", "*_files", "init_inputs", "transformers_weights")
"""Settings that name a file."""


class Weights(NamedTuple):
    """What all weights of a bundle come to."""

    tensors: int
    numbers: int

    @contextmanager
    def building(self) -> Iterator[None]:
        """Raise `BundleError` once a module has more parameters than there are tensors for."""
        registered = 0

        def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
            nonlocal registered
            registered += 1
            # Some are registered twice, since they are tied, or wrapped later.
            if registered > 2 * self.tensors:
                raise BundleError(f"the model has more layers than there are weights for, {self}")

        hook = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def check(self, model: nn.Module) -> None:
        """Raise `BundleError` if a module without memory needs more numbers than there are."""
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        # Buffers, such as numbers of positions, are not always saved.
        if needed > 2 * self.numbers:
            raise BundleError(f"the model has {needed} numbers, but there are weights for {self}")

    def __str__(self) -> str:
        return f"{self.numbers} in {self.tensors} tensors"


def read(file: Path) -> bytes:
    """Return what a small file holds.

    Raises:
        BundleError: it is not small, or no file: a pipe or a device would be read for ever.
        OSError: it cannot be read.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file} is not a regular file; symbolic links are refused too")
    if status.st_size > MOST:
        raise BundleError(f"{file} has {status.st_size} bytes, more than {MOST}")
    return file.read_bytes()


def check_sizes(files: Mapping[str, Path]) -> None:
    """Raise `BundleError` if a file, or all of them, are too large to be read; reads none."""
    sizes = {name: file.lstat().st_size for name, file in files.items()}
    for name, size in sizes.items():
        if size > MOST and not name.endswith(WEIGHTS):
            raise BundleError(f"{name} has {size} bytes, more than {MOST}")
    if (total := sum(sizes.values())) > psutil.virtual_memory().total:
        raise BundleError(f"its files have {total} bytes, more than this machine's memory")


def check_contents(files: Mapping[str, Path], classes: int) -> Weights:
    """Return what the weights come to; `files` are those of a bundle, by name.

    Raises:
        BundleError: a file is not what its name says, or has settings that a bundle may not have.
    """
    held = _weights({n: file for n, file in files.items() if n.endswith(WEIGHTS)})
    for name, file in files.items():
        if name.endswith(".json") and name not in VOCABULARIES:
            settings = _parsed(name, file)
            if name == INDEX:
                _check_index(settings, files)
            else:
                _check_settings(name, settings, max(held.tensors, classes))
    return held


def _weights(files: Mapping[str, Path]) -> Weights:
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
    return Weights(tensors, numbers)


def _parsed(name: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise BundleError(f"{name} is not JSON, or nested too deeply") from None
    if not isinstance(settings, dict):
        raise BundleError(f"{name} is not an object of JSON")
    return settings


def _check_index(settings: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    parts = settings.get("weight_map")
    if not isinstance(parts, dict) or not all(f"victim/{part}" in files for part in parts.values()):
        raise BundleError(f"{INDEX} names files that the bundle does not have")


def _check_settings(name: str, settings: Mapping[str, Any], most: int) -> None:
    if name.startswith("prompt/") and settings.get("peft_type") not in PROMPTS:
        raise BundleError(f"{name}: the type of a prompt must be one of {', '.join(PROMPTS)}")
    for key, value in _entries(settings):
        if value and any(fnmatchcase(key, pattern) for pattern in FOREIGN):
            raise BundleError(f"{name}: {key!r} asks for code that is not ours; remove it")
        if value and any(fnmatchcase(key, pattern) for pattern in ELSEWHERE):
            raise BundleError(f"{name}: {key!r} leads to another file; remove it")
        # Libraries make lists of these lengths before they build anything.
        if ("layer" in key or "label" in key) and isinstance(value, int) and value > most:
            raise BundleError(f"{name}: {key!r} is {value}, but the weights are for {most} at most")


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all entries, at any depth, but for those whose keys are names of classes."""
    waiting: list[Any] = [settings]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting += [value for key, value in one.items() if key != "label2id"]
        elif isinstance(one, list):
            waiting += one
