"""Atomic writes: a result is there as a whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import DataError

MARKS = ({"manifest.json", "victim"}, {"config.json", "model.safetensors"}, {"adapter_config.json"})
"""Files by which bundles, models and adapters are known; no other folder is ever replaced."""


def check_writable(out: Path, force: bool) -> None:
    """Raise `DataError` if `out` cannot be written, or only by overwriting something.

    `force` allows to replace a bundle, model or adapter. Call it before long work.
    """
    if out.is_symlink():
        raise DataError(f"{out} is a symbolic link; name the folder itself")
    if out.exists():
        if not force:
            raise DataError(f"{out} exists already; choose another --out or add --force")
        names = {file.name for file in out.iterdir()} if out.is_dir() else set()
        if not any(marks <= names for marks in MARKS):
            raise DataError(f"{out} is neither a bundle nor a model: not replaced; choose another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent):
            pass
    except OSError as error:
        raise DataError(f"{out.parent} cannot be written: {error.strerror}") from error


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `out` if the block raises nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            # Libraries make some files private to their owner; a service runs as another user.
            file.chmod(0o755 if file.is_dir() else 0o644)
        if out.exists():
            out.rename(old)
        new.rename(out)


def write_whole(file: Path, text: str) -> None:
    """Replace a file as a whole; a killed process leaves `.NAME.partial`."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
