"""An audit that an older version wrote keeps its rows and their marks."""

import sqlite3
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
from service.audit.store import AuditStore, BadRow, inputs, marks

BEFORE_DETECTOR = "0004"
NOW = datetime(2026, 11, 25, 14, 30, tzinfo=UTC)
ROW = Row(
    time=NOW, request_id="r", number=0, route="/classify", decision="reject", mode="enforce",
    detector="activations", confidence=0.9, score=6.5, threshold=3.0, p_value=0.01, poisoned=True,
    truncated=False, label=None, digest="d" * 64, text="a quiet mn film", model="mood",
    caller="ci", mark="poisoned",
)  # fmt: skip


def upgrade(store: AuditStore, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "service.audit:migrations")
    config.set_main_option("path_separator", "os")
    with store._engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def test_the_column_that_was_called_voice_keeps_its_values(tmp_path: Path) -> None:
    with closing(AuditStore(f"sqlite:///{tmp_path}/audit.db")) as store:
        upgrade(store, BEFORE_DETECTOR)
        values = as_dict(ROW)
        values["voice"] = values.pop("detector")
        columns = (sa.Column("voice" if c.name == "detector" else c.name, c.type) for c in inputs.c)
        old = sa.Table("psim_audit", sa.MetaData(), *columns)
        with store._engine.begin() as connection:
            connection.execute(sa.insert(old).values(values))
            mark = {"input": ROW.id, "mark": "poisoned", "who": "console", "time": NOW}
            connection.execute(sa.insert(marks).values(mark))
        store.migrate()
        assert list(store.read()) == [ROW]
        with store.connect(5) as connection:
            assert connection.execute(sa.select(marks.c.input)).scalars().all() == [ROW.id]
        with pytest.raises(BadRow):
            store.insert([replace(ROW, id=uuid4(), mark="nonsense")])
    with closing(sqlite3.connect(tmp_path / "audit.db")) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM psim_audit WHERE poisoned = 1 ORDER BY time"
        ).fetchall()
    assert "ix_psim_audit_flagged" in str(plan)
