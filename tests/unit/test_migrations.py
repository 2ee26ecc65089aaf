"""An audit keeps its rows and their marks when another version wrote it, older or newer."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.dialects import postgresql, sqlite

from service.audit import review
from service.audit.review import MarkEvent
from service.audit.rows import Mark, Row, as_dict
from service.audit.schema import NewerSchemaError, migrations, obstacles
from service.audit.store import AuditStore, BadRow, flagged, inputs, marks, pushes
from tests.support.audit import rows, writer_of
from tests.support.databases import new_database, postgres
from tests.support.paths import ROOT
from tests.support.versions import ROWS
from tests.support.waiting import wait_for

BEFORE_DETECTOR, BEFORE_FINDINGS, BEFORE_SAMPLES = "0004", "0005", "0008"
NEW = ("finding", "override", "override_threshold", "override_p_value", "reason", "sample_rate")
"""Columns that came with the findings, or later."""
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
    with store._engine.begin() as connection:
        how(migrations(connection), revision)


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


def old_insert(url: str) -> tuple[sa.Table, Any]:
    """Return the table as versions before the samples know it, and how they write to it."""
    columns = (sa.Column(c.name, c.type) for c in inputs.c if c.name != "sample_rate")
    old = sa.Table("psim_audit", sa.MetaData(), *columns)
    insert = sqlite.insert if url.startswith("sqlite") else postgresql.insert
    return old, insert(old).on_conflict_do_nothing(index_elements=["id"])


def without_sample(row: Row) -> dict[str, object]:
    return {name: value for name, value in as_dict(row).items() if name != "sample_rate"}


def referred_to(store: AuditStore) -> list[set[UUID]]:
    """Return the inputs that have marks, and those that are to be pushed."""
    with store.connect(5) as connection:
        return [
            {*connection.execute(sa.select(table.c.input)).scalars()} for table in (marks, pushes)
        ]


def test_a_table_with_rows_marks_and_pushes_goes_on_beside_the_tables_of_days(url: str) -> None:
    before = [replace(ROW, id=uuid4(), number=n, mark=None) for n in range(3)]
    late, new = (replace(ROW, id=uuid4(), number=n, mark=None) for n in (3, 4))
    old, insert = old_insert(url)
    with closing(AuditStore(url, push=True)) as store:
        migrate(store, command.upgrade, BEFORE_SAMPLES)
        with store.connect(5) as connection:
            connection.execute(insert, [without_sample(row) for row in before])
            due = {"time": NOW, "attempts": 0, "due": NOW}
            connection.execute(sa.insert(pushes), [due | {"input": row.id} for row in before])
            review.mark(connection, before[0].id, MarkEvent(Mark.POISONED, "ops", NOW))
        store.migrate()
        store.insert([new, replace(new, id=uuid4(), number=5, sample_rate=0.5, finding=None)])
        # A replica of the version before writes, tries again, reads, and marks an input of ours.
        with store.connect(5) as connection:
            for _ in range(2):
                connection.execute(insert, without_sample(late))
            numbers = connection.execute(sa.select(old.c.number).order_by(old.c.number)).scalars()
            assert numbers.all() == [0, 1, 2, 3, 4, 5]
            review.mark(connection, new.id, MarkEvent(Mark.FALSE_ALARM, "ops", NOW))
        found = list(store.read())
        assert [(row.number, row.sample_rate) for row in found] == [(n, 1) for n in range(5)] + [
            (5, 0.5)
        ]
        assert [row.mark for row in found] == ["poisoned", None, None, None, "false_alarm", None]
        pushed = {row.id for row in [*before, new]}
        assert referred_to(store) == [{before[0].id, new.id}, pushed]
        migrate(store, command.downgrade, BEFORE_SAMPLES)
        assert referred_to(store) == [{before[0].id, new.id}, pushed]
        store.migrate()
        assert [row.number for row in store.read()] == [0, 1, 2, 3, 4, 5]
        assert [store.purge(NOW + timedelta(days=2), 4) for _ in range(2)] == [4, 2]
        assert (list(store.read()), referred_to(store)) == ([], [set(), set()])


def test_the_version_before_deletes_what_is_too_old_in_the_tables_of_days(url: str) -> None:
    rows = [replace(ROW, id=uuid4(), number=n, time=NOW + timedelta(n)) for n in range(3)]
    with closing(AuditStore(url)) as store:
        store.migrate()
        store.insert(rows)
        too_old = sa.select(inputs.c.id).where(inputs.c.time < NOW + timedelta(2)).limit(5)
        with store.connect(5) as connection:
            connection.execute(sa.delete(inputs).where(inputs.c.id.in_(too_old)))
        assert list(store.read()) == rows[2:]
        store.purge(NOW + timedelta(2), 5)
        assert list(store.read()) == rows[2:]


NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade() -> None:
    {change}
"""
EXPAND = 'op.add_column("psim_audit", sa.Column("tenant", sa.Text))'
CONTRACT = [
    ('op.drop_column("psim_audit", "p_value")', "the column psim_audit.p_value is gone"),
    ('op.drop_table("psim_audit_marks")', "the table psim_audit_marks is gone"),
    (
        'op.add_column("psim_audit", sa.Column("tenant", sa.Text, nullable=False))',
        "the new column psim_audit.tenant may not be empty",
    ),
]


class NextStore(AuditStore):
    """The store of a version whose migrations go one step further."""

    folder: Path

    def __init__(self, url: str, folder: Path, change: str) -> None:
        super().__init__(url)
        self.folder = folder / "migrations"
        if not self.folder.exists():
            shutil.copytree(ROOT / "service/audit/migrations", self.folder)
            head = max(file.name for file in self.folder.glob("versions/0*.py"))[:4]
            script = NEXT.format(head=head, change=change)
            (self.folder / "versions/next.py").write_text(script)

    def migrate(self) -> None:
        with self._engine.begin() as connection:
            config = migrations(connection)
            config.set_main_option("script_location", str(self.folder))
            command.upgrade(config, "head")

    def insert(self, rows: Sequence[Row]) -> None:
        super().insert(rows)
        with self.connect(5) as connection:
            for row in rows:
                tenant = sa.text("UPDATE psim_audit SET tenant = 'acme' WHERE number = :number")
                connection.execute(tenant, {"number": row.number})

    def tenants(self) -> list[str | None]:
        with self.connect(5) as connection:
            query = sa.text("SELECT tenant FROM psim_audit ORDER BY number")
            return list(connection.execute(query).scalars())


def write(store: AuditStore, *new: Row) -> None:
    """Write rows as a process of this version does, from its start to its end."""
    writer, metrics = writer_of(store)
    writer.start()
    writer.add(new)
    writer.close()
    for name in ("psim_audit_dropped_total", "psim_audit_failures_total"):
        assert metrics.registry.get_sample_value(name) == 0, name


def test_going_back_and_forth_between_versions_loses_nothing(url: str, tmp_path: Path) -> None:
    """Rolled out, rolled back, rolled out again; for a while, both versions write."""
    all_rows = [replace(ROW, id=uuid4(), number=n, mark=None) for n in range(6)]
    write(AuditStore(url), all_rows[0])
    write(NextStore(url, tmp_path, EXPAND), all_rows[1])
    write(AuditStore(url), all_rows[2])
    with closing(AuditStore(url)) as this, closing(NextStore(url, tmp_path, EXPAND)) as next_one:
        this.insert(all_rows[3:4])
        next_one.insert(all_rows[4:5])
        with this.connect(5) as connection:
            review.mark(connection, all_rows[1].id, MarkEvent(Mark.POISONED, "ops", NOW))
    write(NextStore(url, tmp_path, EXPAND), all_rows[5])
    all_rows[1] = replace(all_rows[1], mark="poisoned")
    assert rows(url) == all_rows
    with closing(NextStore(url, tmp_path, EXPAND)) as next_one:
        assert next_one.tenants() == [None, "acme", None, None, "acme", "acme"]


@pytest.mark.parametrize(("change", "lacks"), CONTRACT)
def test_a_newer_schema_that_lacks_something_is_refused_with_both_versions(
    url: str, tmp_path: Path, change: str, lacks: str
) -> None:
    with closing(NextStore(url, tmp_path, change)) as next_one:
        next_one.migrate()
    message = (
        rf"schema next of a newer version, which psim-gateway [\d.]+ with schema \d{{4}} cannot "
        rf"use: {lacks}\. Run the newer version, or name another database in PSIM_AUDIT_URL"
    )
    with closing(AuditStore(url)) as store:
        with pytest.raises(NewerSchemaError, match=message):
            store.migrate()
        with pytest.raises(NewerSchemaError, match=message):
            list(store.read())


def after(url: str, revision: str) -> list[str]:
    """Return what keeps a version of a revision from using the schema of today."""
    with closing(AuditStore(url)) as store:
        migrate(store, command.upgrade, revision)
        then = sa.MetaData()
        with store.connect(5) as connection:
            then.reflect(connection, only=["psim_audit", "psim_audit_marks"])
        store.migrate()
        with store.connect(5) as connection:
            return list(obstacles(connection, then))


def test_a_column_that_was_renamed_is_found_and_one_that_was_added_is_none(url: str) -> None:
    assert after(url, BEFORE_DETECTOR) == ["the column psim_audit.voice is gone"]
    with closing(AuditStore(url)) as store:
        migrate(store, command.downgrade, "base")
    assert after(url, BEFORE_FINDINGS) == []


def test_what_was_released_last_can_use_the_schema_of_today(url: str) -> None:
    """If this fails, a migration contracts too early: see docs/upgrading.md."""
    released = ROWS[1].audit
    if released == "-":
        pytest.skip(f"{ROWS[1].version} has no audit")
    assert after(url, released) == []


def test_a_process_says_once_why_it_cannot_write_and_writes_once_it_can(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer, metrics = writer_of(AuditStore(url))
    value = metrics.registry.get_sample_value
    writer.start()
    writer.add([ROW])
    wait_for(lambda: value("psim_audit_queue_rows") == 0)
    with closing(NextStore(url, tmp_path, CONTRACT[0][0])) as next_one:
        next_one.migrate()
        writer.add([replace(ROW, id=uuid4(), number=1)])
        wait_for(lambda: (value("psim_audit_failures_total") or 0) > 3)
        with next_one.connect(5) as connection:  # back from the contraction, by hand
            connection.execute(sa.text("ALTER TABLE psim_audit ADD COLUMN p_value FLOAT"))
    wait_for(lambda: value("psim_audit_queue_rows") == 0)
    writer.close()
    said = [r for r in caplog.records if "p_value is gone" in str(r.__dict__)]
    assert [r.levelno for r in said] == [logging.ERROR]
    assert [row.number for row in rows(url)] == [0, 1]
