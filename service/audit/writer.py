"""Writes the audit in a thread of its own: a store that is slow or down affects no request.

Rows wait in a bounded queue; if it is full, new rows are dropped and counted. While the store
fails, waiting rows are kept and retried. A row that is written twice is stored once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile

from service.audit.rows import Row, hmac_of, is_plain, is_sampled
from service.audit.schema import NewerSchemaError
from service.audit.store import AuditStore, BadRow
from service.observability.metrics import AuditMetrics

log = logging.getLogger(__name__)

BATCH = 500
"""Rows written at once."""
GATHER_S = 0.2
"""Time that rows wait for others to share a transaction, which costs far more than a row."""
PURGE = 5000
"""Rows deleted at once."""
PURGE_EVERY_S = 3600
JUMP_S = 60
"""A clock that is set forward by more than this is not trusted at once."""
MAX_CHARS = 32_000_000
"""Limit of the characters of all waiting texts."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0
CLOSE_S = 5.0
"""Time at the end for rows that still wait."""


class Writer:
    """Takes rows from one event loop.

    Args:
        store: used in the writer's thread only.
        metrics: counts dropped rows and failures.
        limit: most rows that may wait.
        days: time after which rows are deleted.
        key: of the HMAC of texts; None keeps no HMAC.
        keep_text: whether texts are kept.
        sample: share of the inputs to keep in which nothing was found; all others are kept.
    """

    def __init__(
        self,
        store: AuditStore,
        metrics: AuditMetrics,
        *,
        limit: int,
        days: float,
        key: bytes | None,
        keep_text: bool,
        sample: float = 1.0,
    ) -> None:
        self._store, self._metrics = store, metrics
        self._limit, self._age = limit, timedelta(days=days)
        self._key, self._keep_text, self._rate = key, keep_text, sample
        self._rows: deque[Row] = deque()
        metrics.audit_queue_rows.set_function(lambda: len(self._rows))
        self._chars = 0
        self._wake = threading.Condition()
        self._closing = self._given_up = False
        self._failing: str | None = None
        """What was logged of the failure that lasts."""
        self._dropping = self._migrated = False
        self._purge_at = 0.0
        self._clock_ahead: float | None = None
        """Seconds by which the clock was ahead of the monotonic one at the last purge."""
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, rows: Sequence[Row]) -> None:
        """Queue rows that are to be kept, and drop those that do not fit; never waits."""
        kept = [row for row in rows if not is_plain(row) or is_sampled(row.id, self._rate)]
        self._metrics.audit_sampled_out.inc(len(rows) - len(kept))
        protected = [self._protect(row) for row in kept]
        with self._wake:
            first = not self._rows
            taken = list(takewhile(self._take, protected))
            if first or self._has_batch():
                self._wake.notify()
        self._drop(len(protected) - len(taken))

    def close(self) -> None:
        """Write the waiting rows within `CLOSE_S`; drop the others."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_S)
        with self._wake:
            self._given_up = True
            left = len(self._rows)
            self._rows.clear()
        self._drop(left)

    def _take(self, row: Row) -> bool:
        chars = self._chars + _chars(row)
        if self._given_up or len(self._rows) >= self._limit or chars > MAX_CHARS:
            return False
        self._rows.append(row)
        self._chars = chars
        return True

    def _protect(self, row: Row) -> Row:
        """Replace the text by what the settings allow to keep of it; say the rate of its kind."""
        if self._rate < 1 and is_plain(row):
            row = replace(row, sample_rate=self._rate)
        if row.text is None:
            return row
        digest = None
        if self._key:
            whole = row.text.encode("utf-8", "replace").decode()
            digest = hmac_of(self._key, whole)
        return replace(row, text=row.text if self._keep_text else None, text_hmac=digest)

    def _drop(self, rows: int) -> None:
        if not rows:
            return
        self._metrics.audit_dropped.inc(rows)
        if not self._dropping:
            log.error("the audit drops rows; psim_audit_dropped_total counts them")
        self._dropping = True

    # Everything below runs in the thread.

    def _work(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work, max(0.0, self._purge_at - time.monotonic()))
                if self._rows:
                    self._wake.wait_for(self._has_batch, GATHER_S)
                batch = list(islice(self._rows, BATCH))
                if self._given_up or (self._closing and not batch):
                    break
            try:
                self._step(batch)
            except Exception as error:
                self._fail(error)
                with self._wake:
                    # At the end, it retries as often as time allows.
                    self._wake.wait_for(self._is_ending, FIRST_WAIT_S if self._closing else wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            else:
                wait = FIRST_WAIT_S
        self._store.close()

    def _is_ending(self) -> bool:
        return self._given_up or self._closing

    def _has_work(self) -> bool:
        return bool(self._rows) or self._closing

    def _has_batch(self) -> bool:
        return self._closing or len(self._rows) >= min(BATCH, self._limit)

    def _step(self, batch: Sequence[Row]) -> None:
        if not self._migrated:
            self._store.migrate()
            self._migrated = True
        self._write(batch)
        with self._wake:
            for row in batch:
                if self._rows:  # empty if `close` has given up
                    self._rows.popleft()
                    self._chars -= _chars(row)
        if self._failing:
            log.info("the audit store answers again")
        self._failing, self._dropping = None, False
        self._purge()

    def _write(self, rows: Sequence[Row]) -> None:
        """Write rows; if one is bad, retry each alone and drop only that one."""
        try:
            self._store.insert(rows)
        except BadRow as error:
            if len(rows) > 1:
                for row in rows:
                    self._write([row])
                return
            log.error("the audit store refuses a row", extra={"error": str(error)})
            self._metrics.audit_dropped.inc()

    def _purge(self) -> None:
        if time.monotonic() < self._purge_at:
            return
        if self._clock_jumped():
            log.warning(
                "the clock was set forward; rows that are old now are kept for another hour"
            )
            self._purge_at = time.monotonic() + PURGE_EVERY_S
            return
        if self._store.purge(datetime.now(UTC) - self._age, PURGE) < PURGE:
            self._purge_at = time.monotonic() + PURGE_EVERY_S

    def _clock_jumped(self) -> bool:
        """Return whether the clock was set forward: rows may then look older than they are.

        A clock that is wrong is corrected soon, so the next purge trusts it.
        """
        before = self._clock_ahead
        self._clock_ahead = time.time() - time.monotonic()  # noqa: TID251
        return before is not None and self._clock_ahead - before > JUMP_S

    def _fail(self, error: Exception) -> None:
        self._metrics.audit_failures.inc()
        self._migrated = False  # the table may be gone with the rest
        self._store.close()
        # Only the type of others: their messages may quote a row.
        reason = str(error) if isinstance(error, NewerSchemaError) else type(error).__name__
        if reason != self._failing:
            log.error("the audit store fails", extra={"error": reason})
        self._failing = reason


def _chars(row: Row) -> int:
    return len(row.text or "")
