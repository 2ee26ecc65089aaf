"""Rows of an audit, and what writes and reads them."""

from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from service.audit.rows import Row
from service.audit.store import AuditStore
from service.audit.writer import Writer
from service.observability.metrics import Metrics
from tests.support.requests import POISONED

NOW = datetime(2026, 11, 25, 14, 30, tzinfo=UTC)
ROW = Row(
    time=NOW, request_id="r", number=0, route="/classify", decision="reject", mode="enforce",
    detector="confidence", confidence=0.9, score=6.5, threshold=3.0, p_value=0.01,
    finding="triggered", poisoned=True, truncated=False, label=None, digest="d" * 64, text=POISONED,
)  # fmt: skip


def rows(url: str, **chosen: Any) -> list[Row]:
    """Return what a store holds."""
    with closing(AuditStore(url, read_only=True)) as store:
        return list(store.read(**chosen))


CENTURY = 36_500.0
"""Days after which rows of `NOW` are not too old, whenever the tests run."""


def writer_of(
    store: AuditStore, limit: int = 100, days: float = CENTURY, sample: float = 1
) -> tuple[Writer, Metrics]:
    """Return a writer to a store, and its metrics."""
    metrics = Metrics()
    writer = Writer(store, metrics, limit=limit, days=days, key=None, keep_text=True, sample=sample)
    return writer, metrics
