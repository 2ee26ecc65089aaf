"""How large a row of the audit is, and how many are written a second.

    python benchmarks/audit_rows.py URL      # of an empty store: sqlite:///… or postgresql://…

Rows are those of single requests: ids of 32 characters, with an HMAC, without texts.
"""

import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from uuid import uuid4

import sqlalchemy as sa
import typer

from service.audit.rows import Row
from service.audit.store import AuditStore
from service.audit.writer import BATCH

ROW = Row(
    time=datetime.now(UTC), request_id="", number=0, route="/classify", decision="allow",
    mode="enforce", detector="confidence", confidence=0.6, score=1.5, threshold=3.5, p_value=0.2,
    finding=None, poisoned=False, truncated=False, label="positive", digest="d" * 64, text=None,
)  # fmt: skip


def size(url: str) -> int:
    """Return what the table takes on disk, indices and all, in bytes."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return Path(parsed.database or "").stat().st_size
    engine = sa.create_engine(parsed.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT pg_total_relation_size('psim_audit')")).scalar()
    engine.dispose()
    return int(found or 0)


def main(url: str, rows: int = 100_000) -> None:
    with closing(AuditStore(url)) as store:
        store.migrate()
        seconds = 0.0
        for start in range(0, rows, BATCH):
            batch = [
                replace(
                    ROW, id=uuid4(), time=ROW.time + timedelta(milliseconds=start + i),
                    request_id=token_hex(16), text_hmac=token_hex(32),
                )
                for i in range(min(BATCH, rows - start))
            ]  # fmt: skip
            started = time.perf_counter()
            store.insert(batch)
            seconds += time.perf_counter() - started
    print(f"{size(url) / rows:.0f} bytes a row, {rows / seconds:,.0f} rows a second")


if __name__ == "__main__":
    typer.run(main)
