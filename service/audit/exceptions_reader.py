"""The reviewed exceptions in force, as the service knows them."""

import logging
import threading
import time
from contextlib import closing
from datetime import UTC, datetime

from service.audit.exceptions import Known, in_force
from service.audit.rows import hmac_of
from service.audit.schema import AuditError
from service.audit.store import AuditStore
from service.observability.metrics import AuditMetrics

log = logging.getLogger(__name__)

READ_EVERY_S = 2.0
"""Time after which every replica knows of a change."""
STALE_S = 60.0
"""Time without an answer of the store after which no exception counts: one may be removed."""
READ_S = 5.0


class Exceptions:
    """The exceptions in force, read again and again in a thread of its own.

    Args:
        url: of the audit.
        key: of the HMAC of texts.
        metrics: tell how many are in force, and whether they are too old to count.
    """

    def __init__(self, url: str, key: bytes, metrics: AuditMetrics) -> None:
        self._url, self._key, self._metrics = url, key, metrics
        self._known: Known = {}
        self._read_at = -STALE_S
        self._migrated = False
        self._failing: str | None = None
        """What was logged of the failure that lasts."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="exceptions", daemon=True)
        metrics.exceptions.set_function(lambda: 0 if self.stale else len(self._known))
        metrics.exceptions_stale.set_function(lambda: self.stale)

    @property
    def stale(self) -> bool:
        """Whether they were not read for so long that none of them counts."""
        return time.monotonic() - self._read_at > STALE_S

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(READ_S)

    def covers(self, digest: str, text: str) -> bool:
        """Return whether an exception for exactly this text is in force for a bundle."""
        if not self._known or self.stale:
            return False
        try:
            expires = self._known.get((digest, hmac_of(self._key, text)))
        except UnicodeEncodeError:
            return False
        return expires is not None and datetime.now(UTC) < expires

    # Everything below runs in the thread.

    def _work(self) -> None:
        store = AuditStore(self._url)
        with closing(store):
            while not self._closing.is_set():
                try:
                    self._read(store)
                except Exception as error:  # whatever a database driver raises
                    self._fail(store, error)
                self._closing.wait(READ_EVERY_S)

    def _read(self, store: AuditStore) -> None:
        if not self._migrated:
            store.migrate()
            self._migrated = True
        with store.connect(READ_S) as connection:
            self._known = in_force(connection, datetime.now(UTC))
        self._read_at, self._failing = time.monotonic(), None

    def _fail(self, store: AuditStore, error: Exception) -> None:
        self._metrics.audit_failures.inc()
        self._migrated = False
        store.close()
        reason = str(error) if isinstance(error, AuditError) else type(error).__name__
        if reason != self._failing:
            log.error("the exceptions cannot be read", extra={"error": reason})
        self._failing = reason
