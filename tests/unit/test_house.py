"""How the house is kept: small folders, short functions, names that say one thing."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = [file for half in ("service", "models") for file in sorted((ROOT / half).rglob("*.py"))]
MAX_FILES, MAX_LINES = 12, 40
TABLES = {"ModelFamilies.__init__", "ModelMetrics.__init__"}
"""Functions that are tables of data, and so may be longer."""


def imported(file: Path) -> Iterator[str]:
    """Return the full name of each module, and of each name, that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the qualified name of each function and its number of lines."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name[:-1], (child.end_lineno or 0) - child.lineno + 1
        yield from functions(child, name)


def test_no_file_imports_tests() -> None:
    assert len(TESTS) > 50
    for file in TESTS:
        for name in imported(file):
            assert not any(part.startswith("test_") for part in name.split(".")), (file, name)


def test_folders_are_small() -> None:
    assert len(SOURCES) > 100
    files = Counter(str(file.parent.relative_to(ROOT)) for file in SOURCES)
    assert not {folder: n for folder, n in files.items() if n > MAX_FILES}


def test_functions_are_short() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}": lines
        for file in SOURCES
        for name, lines in functions(ast.parse(file.read_text()))
        if lines > MAX_LINES and name not in TABLES
    }
    assert not found


def test_no_class_name_stands_twice() -> None:
    names = Counter(
        node.name
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not {name: n for name, n in names.items() if n > 1}
