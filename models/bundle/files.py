"""How files of a bundle are read: each is opened once, and never a pipe, a device or a link.

Whoever can write to a bundle could swap a file between its check and its use. And a file that stays
mapped changes with the file on disk, or ends the process once that is truncated. So a bundle is
loaded from a private copy, which is memory of this process.
"""

import errno
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from models.errors import BundleError

MAX_FILE_BYTES = 64 * 2**20
"""Limit for files that are read as a whole. The largest in use are vocabularies of 35 MB."""
CHUNK = 2**18


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file to read it.

    Raises:
        BundleError: it is anything else: reading a pipe never ends.
        OSError: the file cannot be opened.
    """
    refusal = BundleError(f"{file} is not a regular file; symbolic links are refused too")
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise refusal if error.errno == errno.ELOOP else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refusal
    return os.fdopen(descriptor, "rb")


def read_small(file: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        BundleError: the file is too large, or not a regular one.
        OSError: the file cannot be read.
    """
    with open_regular(file) as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise BundleError(f"{file} has more than {MAX_FILE_BYTES} bytes")
    return content


@contextmanager
def private_copy(path: Path, sizes: Mapping[str, int]) -> Iterator[Path]:
    """Copy files of the folder `path`; yield a folder with the copies, which nobody can change.

    The folder is removed at the end. Copies that are mapped stay in memory until they are unmapped.

    Args:
        path: folder of the originals.
        sizes: number of bytes to copy, by name of the file; of a file that has grown, no more.

    Raises:
        BundleError: a file cannot be copied.
    """
    with ExitStack() as until_the_end:
        try:
            private = tempfile.TemporaryDirectory(prefix="psim-bundle-")
        except OSError as error:
            raise BundleError(f"no folder for temporary files: {error}; set TMPDIR") from error
        folder = Path(until_the_end.enter_context(private))
        for name, size in sizes.items():
            (folder / name).parent.mkdir(exist_ok=True)
            try:
                with open_regular(path / name) as original:
                    copy = until_the_end.enter_context(_in_memory(folder / name))
                    _copy(original, copy, size)
            except OSError as error:
                raise BundleError(f"{name} cannot be read: {error.strerror}") from error
            _seal(copy)
        yield folder


@contextmanager
def files_in_memory(names: Sequence[str]) -> Iterator[Path]:
    """Yield a folder with empty files in memory; it is removed at the end.

    Raises:
        OSError: there is no folder for temporary files.
    """
    with ExitStack() as until_the_end:
        private = tempfile.TemporaryDirectory(prefix="psim-traced-")
        folder = Path(until_the_end.enter_context(private))
        for name in names:
            until_the_end.enter_context(_in_memory(folder / name))
        yield folder


def descriptors_of(folder: Path) -> list[int]:
    """Return by which descriptors the files of a folder of ours are open, if they are in memory.

    A process that inherits them can open the files too.
    """
    return [int(file.readlink().name) for file in folder.rglob("*") if file.is_symlink()]


def _in_memory(file: Path) -> BinaryIO:
    """Return a new file in memory, which can be opened as `file` while it is open."""
    if sys.platform != "linux":  # a file in the private folder, which is removed
        return file.open("wb")
    copy = os.fdopen(os.memfd_create(file.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb")
    file.symlink_to(f"/proc/self/fd/{copy.fileno()}")
    return copy


def _copy(original: BinaryIO, copy: BinaryIO, size: int) -> None:
    while size > 0 and (chunk := original.read(min(CHUNK, size))):
        copy.write(chunk)
        size -= len(chunk)
    copy.flush()


def _seal(copy: BinaryIO) -> None:
    """Make sure that a copy never changes again, also not for whoever shares our user."""
    if sys.platform == "linux":
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
