"""Stores of the audit, for tests of what is kept there."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import new_database, postgres


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="psim-postgres-")
    with folder, postgres(Path(folder.name)) as (url, _):
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/audit.db"
    return new_database(request.getfixturevalue("cluster"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The URL of an empty store, where one kind is enough."""
    return f"sqlite:///{tmp_path}/audit.db"
