"""Programs that tests need and that are no Python packages."""

import os
import shutil
from pathlib import Path

import pytest

WITHOUT = "TESTS_WITHOUT_SERVERS"
"""Set to 1 where servers cannot be installed; the gate never does, so that nothing is missed."""


def program(name: str, package: str) -> str:
    """Return the path of a program; a test that needs it fails where it is missing."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        if os.environ.get(WITHOUT) == "1":
            pytest.skip(f"{name} is missing and {WITHOUT} is set")
        pytest.fail(f"{name} is missing: apt-get install {package}, or set {WITHOUT}=1 to skip")
    return found


def peer(variable: str, package: str) -> str:
    """Return a program of a peer that wants an environment of its own; skip where there is none."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{package} wants an environment of its own: {variable}, docs/compatibility.md")
    return found
