"""What the audit costs: rows a second, bytes a day at a billion inputs, and retention.

    python benchmarks/audit_rows.py URL      # of an empty store: sqlite:///… or postgresql://…

Rows are those of single requests: ids of 32 characters, with an HMAC, without texts. One input in
a hundred has a finding. Each sampling rate is a run of the service's own writer on as many inputs,
from the queue to the last commit; each is on a day of its own. In PostgreSQL, COPY and the INSERT
that was there before it take turns.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from uuid import uuid4

import sqlalchemy as sa
import typer

from service.audit.postgres import days
from service.audit.rows import Row, as_dict
from service.audit.store import AuditStore
from service.audit.writer import BATCH, PURGE, Writer
from service.console.overview import overview
from service.console.query import ConsoleQuery
from service.observability.metrics import Metrics

A_DAY = 1_000_000_000
FLAGGED = 0.01
NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
PASSED = Row(
    time=NOON, request_id="", number=0, route="/classify", decision="allow",
    mode="enforce", detector="confidence", confidence=0.6, score=1.5, threshold=3.5, p_value=0.2,
    finding=None, poisoned=False, truncated=False, label="positive", digest="d" * 64, text=None,
)  # fmt: skip
FOUND = replace(
    PASSED, decision="reject", score=6.5, p_value=0.001, finding="triggered", poisoned=True,
    label=None, override=0.9, override_threshold=0.5, override_p_value=0.01,
)  # fmt: skip


def rows_of(day: int, number: int) -> list[Row]:
    """Return inputs of a day before today."""
    start = NOON - timedelta(days=day)
    return [
        replace(
            FOUND if n % round(1 / FLAGGED) == 0 else PASSED,
            id=uuid4(),
            time=start + timedelta(milliseconds=n),
            request_id=token_hex(16),
            text_hmac=token_hex(32),
        )
        for n in range(number)
    ]


def batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def size(store: AuditStore, url: sa.URL, day: int) -> int:
    """Return what the rows of a day take on disk, indices and all, in bytes; all in SQLite."""
    if url.get_backend_name() == "sqlite":
        return Path(url.database or "").stat().st_size
    name = days.table_of(days.day_of(NOON - timedelta(days=day)))
    with store.connect(60) as connection:
        asked = sa.text("SELECT pg_total_relation_size(to_regclass(:name))")
        return int(connection.execute(asked, {"name": name}).scalar() or 0)


def write(store: AuditStore, inputs: Sequence[Row], sample: float) -> tuple[int, float]:
    """Write inputs as the service does; return the rows that were kept, and the seconds."""
    metrics = Metrics()
    writer = Writer(
        store, metrics, limit=len(inputs), days=36_500, key=None, keep_text=False, sample=sample
    )
    started = time.perf_counter()
    writer.start()
    for batch in batches(inputs):
        writer.add(batch)
    while writer._rows:
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    writer.close()
    left_out = metrics.registry.get_sample_value("psim_audit_sampled_out_total") or 0
    return len(inputs) - round(left_out), seconds


def sampling(store: AuditStore, url: sa.URL, inputs: int) -> None:
    print("| sampled | rows/s | inputs/s | bytes a row | rows a day | GB a day |")
    print("| --- | --- | --- | --- | --- | --- |")
    for day, rate in enumerate((0.01, 0.1, 1.0), 1):
        before = size(store, url, day)
        rows, seconds = write(store, rows_of(day, inputs), rate)
        each = (size(store, url, day) - before) / rows
        a_day = A_DAY * (FLAGGED + (1 - FLAGGED) * rate)
        print(
            f"| {100 * rate:g} % | {rows / seconds:,.0f} | {inputs / seconds:,.0f} | {each:.0f} "
            f"| {a_day:,.0f} | {a_day * each / 1e9:,.1f} |"
        )


def copy_and_insert(store: AuditStore, rows: int) -> None:
    """Let both write batches in turn: COPY to a day's table, INSERT to that of all inputs."""
    seconds = {"COPY": 0.0, "INSERT": 0.0}
    for batch, other in zip(*(batches(rows_of(10, rows)) for _ in seconds), strict=True):
        started = time.perf_counter()
        store.insert(batch)
        between = time.perf_counter()
        with store._engine.begin() as connection:
            connection.execute(store._insert, [as_dict(row) for row in other])
        seconds["INSERT"] += time.perf_counter() - between
        seconds["COPY"] += between - started
    for how, taken in seconds.items():
        print(f"{how}: {rows / taken:,.0f} rows a second")
    print(f"COPY is {seconds['INSERT'] / seconds['COPY']:.1f} times as fast")


def statistics(store: AuditStore, inputs: int) -> None:
    """Let the console add up the day that is kept whole."""
    end = NOON - timedelta(days=3, hours=-12)
    started = time.perf_counter()
    with store.connect(600) as connection:
        shown = overview(connection, ConsoleQuery(), end, {PASSED.digest: 999})
    assert shown.traffic.rows == inputs
    print(f"overview of {inputs:,} rows: {time.perf_counter() - started:.1f} s")


def retention(store: AuditStore, rows: int) -> None:
    """Delete and drop what `copy_and_insert` wrote, as many rows each; other days are younger."""
    before = NOON - timedelta(days=9)
    started = time.perf_counter()
    if store._file is None:
        days.drop(store._engine, before)
        print(f"dropping {rows:,} rows: {time.perf_counter() - started:.3f} s")
        started = time.perf_counter()
    while store.purge(before, PURGE) == PURGE:
        pass
    print(f"deleting {rows:,} rows: {time.perf_counter() - started:.3f} s")
    if store._file:
        return
    started = time.perf_counter()
    with store._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM"))
    print(f"and vacuum: {time.perf_counter() - started:.3f} s")


def main(url: str, inputs: int = 200_000, rows: int = 100_000) -> None:
    """Measure on as many inputs for each sampling rate, and rows for each way to write them."""
    parsed = sa.make_url(url)
    with closing(AuditStore(url)) as store:
        store.migrate()
        with store.connect(10) as connection:
            server = connection.dialect.server_version_info or ()
        print(f"{parsed.get_backend_name()} {'.'.join(map(str, server))}, psim-gateway", end=" ")
        print(f"{version('psim-gateway')}, SQLAlchemy {version('sqlalchemy')}\n")
        sampling(store, parsed, inputs)
        print()
        statistics(store, inputs)
        if store._file is None:
            copy_and_insert(store, rows)
        else:
            for batch in batches(rows_of(10, rows)):
                store.insert(batch)
        retention(store, rows)


if __name__ == "__main__":
    typer.run(main)
