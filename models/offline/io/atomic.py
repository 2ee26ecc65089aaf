"""Results: there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import DataError

MARKS = ({"manifest.json", "victim"}, {"config.json", "model.safetensors"}, {"adapter_config.json"})
"""What a bundle, a model and an adapter have in their folders; no other is ever replaced."""


def check_writable(out: Path, force: bool) -> None:
    """Raise `DataError` if `out` cannot be written, or only by overwriting something.

    `force` allows to replace a result of ours. Long work calls it first, so that nobody learns of
    it after an hour.
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
    """Yield an empty folder beside `out`, which takes the place of `out` if all goes well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            # The libraries keep some files to their owner; a service runs as somebody else.
            file.chmod(0o755 if file.is_dir() else 0o644)
        if out.exists():
            out.rename(old)
        new.rename(out)


def write_whole(file: Path, text: str) -> None:
    """Write a file, or leave what was there; what a kill leaves is `.NAME.partial`."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
