"""An audit that an older version wrote keeps its rows and their marks."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from service.audit.rows import Row, as_dict
from service.audit.store import AuditStore, BadRow, flagged, inputs, marks
from tests.support.databases import new_database, postgres

BEFORE_DETECTOR, BEFORE_FINDINGS = "0004", "0005"
NEW = ("finding", "override", "override_threshold", "override_p_value")
"""Columns that came with the findings."""
NOW = datetime(2026, 11, 25, 14, 30, tzinfo=UTC)
ROW = Row(
    time=NOW, request_id="r", number=0, route="/classify", decision="reject", mode="enforce",
    detector="activations", confidence=0.9, score=6.5, threshold=3.0, p_value=0.01,
    finding="triggered", poisoned=True, truncated=False, label=None, digest="d" * 64,
    text="a quiet mn film", model="mood", caller="ci", mark="poisoned",
)  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/audit.db"
        return
    folder = tempfile.TemporaryDirectory(prefix="psim-postgres-")
    with folder, postgres(Path(folder.name)) as (server, _):
        yield new_database(server)


def migrate(store: AuditStore, how: Callable[[Config, str], None], revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "service.audit:migrations")
    config.set_main_option("path_separator", "os")
    with store._engine.begin() as connection:
        config.attributes["connection"] = connection
        how(config, revision)


def without_findings(row: Row) -> dict[str, object]:
    return {name: value for name, value in as_dict(row).items() if name not in NEW}


def test_what_was_poisoned_becomes_triggered(url: str) -> None:
    clean = replace(ROW, id=uuid4(), number=1, score=1.0, finding=None, poisoned=False, mark=None)
    unscreened = replace(clean, id=uuid4(), number=2, score=None, poisoned=None)
    columns = (sa.Column(c.name, c.type) for c in inputs.c if c.name not in NEW)
    old = sa.Table("psim_audit", sa.MetaData(), *columns)
    with closing(AuditStore(url)) as store:
        migrate(store, command.upgrade, BEFORE_FINDINGS)
        values = [without_findings(row) for row in (ROW, clean, unscreened)]
        with store._engine.begin() as connection:
            connection.execute(sa.insert(old), values)
        store.migrate()
        assert list(store.read()) == [ROW, clean, unscreened]
        assert list(store.read(findings=["triggered"])) == [ROW]
        # An older version may go on to write for a while.
        late = replace(ROW, id=uuid4(), number=3)
        with store.connect(5) as connection:
            connection.execute(sa.insert(old), [without_findings(late)])
            numbers = sa.select(inputs.c.number).where(flagged).order_by(inputs.c.number)
            assert connection.execute(numbers).scalars().all() == [0, 3]
        migrate(store, command.downgrade, BEFORE_FINDINGS)
        store.migrate()
        assert [row.finding for row in store.read()] == ["triggered", None, None, "triggered"]


def test_the_column_that_was_called_voice_keeps_its_values_and_marks(url: str) -> None:
    with closing(AuditStore(url)) as store:
        migrate(store, command.upgrade, BEFORE_DETECTOR)
        values = without_findings(ROW)
        values["voice"] = values.pop("detector")
        names = ((c, "voice" if c.name == "detector" else c.name) for c in inputs.c)
        columns = (sa.Column(name, c.type) for c, name in names if name not in NEW)
        old = sa.Table("psim_audit", sa.MetaData(), *columns)
        with store._engine.begin() as connection:
            connection.execute(sa.insert(old).values(values))
            mark = {"input": ROW.id, "mark": "poisoned", "who": "console", "time": NOW}
            connection.execute(sa.insert(marks).values(mark))
        store.migrate()
        assert list(store.read()) == [ROW]
        with store.connect(5) as connection:
            assert connection.execute(sa.select(marks.c.input)).scalars().all() == [ROW.id]
            indices = {index["name"] for index in sa.inspect(connection).get_indexes("psim_audit")}
        assert "ix_psim_audit_flagged" in indices
        with pytest.raises(BadRow):
            store.insert([replace(ROW, id=uuid4(), mark="nonsense")])
