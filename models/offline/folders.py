"""Result folders: there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import DataError

OURS = ("manifest.json", "config.json", "adapter_config.json")
"""A bundle or a model has one of these; no other folder is ever replaced."""


def check_writable(out: Path, force: bool) -> None:
    """Raise `DataError` if writing `out` would overwrite a result without `force`, or a stranger's.

    Long work calls it first, so that nobody learns of it after an hour.
    """
    if not out.exists():
        return
    if not force:
        raise DataError(f"{out} exists already; choose another --out or add --force")
    if not any((out / name).is_file() for name in OURS):
        raise DataError(f"{out} holds neither a bundle nor a model: not replaced; choose another")


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which takes the place of `out` if all goes well."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
