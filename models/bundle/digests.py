"""SHA-256 digests of files and folders."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_files(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `path`, by relative POSIX path."""
    return {
        str(PurePosixPath(file.relative_to(path))): file_digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def tree_digest(files: Mapping[str, str]) -> str:
    """Return one SHA-256 for a set of files, given their digests by name."""
    listing = "\n".join(f"{digest}  {name}" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()
