"""The tables of days in PostgreSQL: every row is in one, once, and old ones are dropped whole."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from service.audit import review
from service.audit.postgres import days
from service.audit.review import MarkEvent
from service.audit.rows import Mark, Row
from service.audit.store import AuditStore, marks, pushes
from tests.support.audit import NOW, ROW, rows, writer_of
from tests.support.databases import new_database

DAY = timedelta(days=1)
MIDNIGHT = NOW.replace(hour=0, minute=0)


@pytest.fixture
def database(cluster: str) -> str:
    """The URL of an empty database in PostgreSQL."""
    return new_database(cluster)


@pytest.fixture
def store(database: str) -> Iterator[AuditStore]:
    with closing(AuditStore(database, push=True)) as opened:
        opened.migrate()
        yield opened


def new(time: datetime = NOW, **changes: Any) -> Row:
    return replace(ROW, id=uuid4(), time=time, **changes)


def ask(store: AuditStore, query: str) -> list[Any]:
    with store.connect(10) as connection:
        return list(connection.execute(sa.text(query)).scalars())


def tables(store: AuditStore) -> dict[str, int]:
    """Return the number of rows in the table of each day, and in the one of no day."""
    with store.connect(10) as connection:
        names = days.names(connection)
    return {n: ask(store, f"SELECT count(*) FROM ONLY {n}")[0] for n in ["psim_audit", *names]}


def referred_to(store: AuditStore) -> tuple[set[Any], set[Any]]:
    """Return the inputs that have marks, and those that are to be pushed."""
    with store.connect(10) as connection:
        return (
            set(connection.execute(sa.select(marks.c.input)).scalars()),
            set(connection.execute(sa.select(pushes.c.input)).scalars()),
        )


def mark(store: AuditStore, row: Row) -> None:
    with store.connect(10) as connection:
        review.mark(connection, row.id, MarkEvent(Mark.POISONED, "ann", NOW))


def test_late_and_early_rows_are_in_the_table_of_their_day_and_no_row_is_lost(
    store: AuditStore, database: str
) -> None:
    east = timezone(timedelta(hours=9))
    times = [
        MIDNIGHT,
        MIDNIGHT - timedelta(microseconds=1),
        MIDNIGHT + DAY,
        NOW - 400 * DAY,
        NOW + 400 * DAY,
        MIDNIGHT.astimezone(east) - timedelta(seconds=1),
        datetime(1970, 1, 1, tzinfo=UTC),
    ]
    store.insert([new(time) for time in times])
    assert tables(store) == {
        "psim_audit": 0,
        "psim_audit_19700101": 1,
        "psim_audit_20251021": 1,
        "psim_audit_20261124": 2,
        "psim_audit_20261125": 1,
        "psim_audit_20261126": 1,
        "psim_audit_20271230": 1,
    }
    assert [row.time for row in rows(database)] == sorted(times)


def test_rows_come_by_copy_and_one_by_one_only_if_one_is_there_or_bad(
    store: AuditStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one: list[int] = []
    insert = days.insert

    def counted(connection: sa.Connection, day: date, some: Sequence[Any]) -> None:
        one_by_one.append(len(some))
        insert(connection, day, some)

    monkeypatch.setattr(days, "insert", counted)
    first = [new(label="tab \t, line \n, \\N and \\. 'quoted'", number=n) for n in range(50)]
    store.insert(first)
    assert not one_by_one
    more = [new(NOW + timedelta(seconds=1), number=50), new(NOW + DAY, number=51)]
    store.insert([*first, *more])  # as after a connection that broke behind the commit
    assert one_by_one == [51]  # the other day had none of them
    assert rows(database) == [*first, *more]
    assert referred_to(store)[1] == {row.id for row in [*first, *more]}


class CommitsAndFails(AuditStore):
    failures = 2

    def insert(self, rows: Sequence[Row]) -> None:
        super().insert(rows)
        if self.failures:
            self.failures -= 1
            raise OSError("the answer to the commit was lost")


def test_a_batch_that_is_written_again_is_there_once(database: str) -> None:
    writer, metrics = writer_of(CommitsAndFails(database, push=True))
    writer.start()
    new_rows = [new(number=n) for n in range(20)]
    writer.add(new_rows)
    writer.close()
    assert metrics.registry.get_sample_value("psim_audit_failures_total") == 2
    assert metrics.registry.get_sample_value("psim_audit_dropped_total") == 0
    assert rows(database) == new_rows


def test_processes_that_start_a_day_together_lose_no_row(store: AuditStore, database: str) -> None:
    together = threading.Barrier(6)
    failed: list[BaseException] = []

    def run(number: int) -> None:
        with closing(AuditStore(database)) as own:
            together.wait(10)
            try:
                for n in range(5):
                    own.insert([new(NOW + n * DAY, number=number)])
                    own.purge(NOW - 30 * DAY, 10)
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert len(rows(database)) == 30


def test_a_table_that_somebody_dropped_is_made_again(store: AuditStore, database: str) -> None:
    store.insert([new()])
    with store.connect(10) as connection:
        connection.execute(sa.text("DROP TABLE psim_audit_20261125"))
    kept = new()
    store.insert([kept])
    assert rows(database) == [kept]


def test_the_day_of_tomorrow_is_there_before_it_comes(store: AuditStore) -> None:
    store.purge(NOW, 10)
    tomorrow = days.table_of(days.day_of(datetime.now(UTC) + DAY))
    assert tables(store) == {"psim_audit": 0, tomorrow: 0}


def test_a_day_is_dropped_whole_with_its_marks_and_pushes_and_never_before_its_end(
    store: AuditStore, database: str
) -> None:
    old, edge, young = (new(MIDNIGHT + n * DAY - timedelta(microseconds=1)) for n in (0, 1, 2))
    store.insert([old, edge, young])
    for row in (old, edge, young):
        mark(store, row)
    kept = [edge.id, young.id]
    # The last moment of the 24th is 30 days old, then all of the 25th but for its last moment.
    for before, left in (
        (old.time, [old.id, *kept]),
        (old.time + timedelta(microseconds=1), kept),
        (edge.time, kept),
    ):
        store.purge(before, 10)
        assert [row.id for row in rows(database)] == left
        assert referred_to(store) == ({*left}, {*left})


def test_a_reader_is_waited_for_shortly_and_the_table_goes_the_next_time(
    store: AuditStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(days, "DROP_WAIT_S", 0.1)
    store.insert([new(NOW - 2 * DAY), new()])
    with closing(AuditStore(database, read_only=True)) as other:
        reading = other.read()
        next(reading)
        store.purge(NOW, 10)
        assert len(rows(database)) == 2
        store.insert([new(NOW + DAY)])  # nor does anybody else wait for the reader
        assert len(list(reading)) == 1
    store.purge(NOW, 10)
    assert [row.time for row in rows(database)] == [NOW, NOW + DAY]


def test_a_query_reads_no_other_days_than_it_asks_for(store: AuditStore) -> None:
    store.insert([new(NOW + n * DAY) for n in range(5)])
    query = sa.text(
        "EXPLAIN SELECT count(*) FROM psim_audit WHERE time >= :since AND time < :until"
    )
    period = {"since": NOW + DAY, "until": NOW + 1.1 * DAY}
    with store.connect(10) as connection:
        plan = "\n".join(connection.execute(query, period).scalars())
    assert "psim_audit_20261126" in plan
    assert not [day for day in (25, 27, 28, 29) if f"psim_audit_202611{day}" in plan]


def test_a_day_has_the_indices_of_the_table_that_it_inherits_from(store: AuditStore) -> None:
    store.insert([new()])
    with store.connect(10) as connection:
        inspector = sa.inspect(connection)
        of_day, of_all = (
            sorted(
                (index["column_names"], "postgresql_where" in index.get("dialect_options", {}))
                for index in inspector.get_indexes(name)
            )
            for name in ("psim_audit_20261125", "psim_audit")
        )
        key = inspector.get_pk_constraint("psim_audit_20261125")["constrained_columns"]
    assert of_day == of_all
    assert len(of_day) == 4
    assert key == ["id"]
