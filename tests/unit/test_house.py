"""How the tests are kept: what they share is in `tests/support`."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Return the full name of each module, and of each name, that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_file_imports_tests() -> None:
    assert len(FILES) > 50
    for file in FILES:
        for name in imported(file):
            assert not any(part.startswith("test_") for part in name.split(".")), (file, name)
