"""Pushes findings to a receiver: signed CloudEvents over HTTP, at least once.

The writer queues a finding in the transaction that writes its row, so none is lost, whoever
restarts. One process at a time pushes, by a lease; an event leaves the queue once the receiver has
answered 2xx. An event that is pushed twice has the same id both times. It holds no text.
"""

import asyncio
import base64
import hmac
import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote
from uuid import UUID, uuid4

import aiohttp
import sqlalchemy as sa

from service.audit.rows import NAMES, Row, as_json
from service.audit.schema import AuditError
from service.audit.store import AuditStore, inputs, pushes
from service.observability.metrics import AuditMetrics

log = logging.getLogger(__name__)

LEASE, LEASE_S = "push", 60.0
TURN_S = 30.0
"""Longest time that events are pushed for under one lease; the last one may take a timeout more."""
TIMEOUT_S = 10.0
BATCH = 50
PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LONGEST_BACKOFF_S = 3600.0
STORE_S = 10.0
LATER = (408, 425, 429)
"""Statuses below 500 that are not about the event."""
TYPE = "psim.finding.v1"
PRIVATE = ("id", "time", "text", "text_hmac", "mark", "poisoned", "sample_rate")
"""Columns that an event's data lacks: what could tell a text, or is said elsewhere. Findings are
never sampled."""


@dataclass(frozen=True, slots=True)
class Event:
    """A finding that is to be pushed."""

    row: Row
    attempts: int
    """How often it was tried."""


class ReceiverFails(Exception):
    """The receiver cannot be reached, or takes no event at all for now."""


class Push:
    """Pushes what is queued, in a thread of its own.

    Args:
        url: of the audit.
        receiver: where to push.
        key: of the signature.
        metrics: tell what was pushed, and how much waits for how long.
    """

    def __init__(self, url: str, receiver: str, key: bytes, metrics: AuditMetrics) -> None:
        self._url, self._receiver, self._key, self._metrics = url, receiver, key, metrics
        self._owner = str(uuid4())
        self._failures = 0
        """Turns in a row that failed."""
        self._logged: str | None = None
        """What was logged of a failure, until something is delivered or nothing waits."""
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._work()), name="push", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; what waits stays queued."""
        self._closing.set()
        self._thread.join(TIMEOUT_S)

    # Everything below runs in the thread.

    async def _work(self) -> None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        jar = aiohttp.DummyCookieJar()
        store = AuditStore(self._url)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar) as session:
            with closing(store):
                migrated = False
                while not self._closing.is_set():
                    try:
                        if not migrated:
                            store.migrate()
                            migrated = True
                        await self._turn(store, session)
                    except Exception as error:  # whatever a database driver raises
                        migrated = False
                        store.close()
                        self._fail(error)
                    else:
                        self._failures = 0
                    self._closing.wait(min(PAUSE_S * 2**self._failures, LONGEST_PAUSE_S))

    async def _turn(self, store: AuditStore, session: aiohttp.ClientSession) -> None:
        """Push what is due, if this process has the lease.

        Raises:
            AuditError: the store cannot be used.
            ReceiverFails: nothing can be pushed for now.
        """
        end = time.monotonic() + TURN_S
        while events := self._due(store):
            for event in events:
                if self._closing.is_set() or time.monotonic() > end:
                    return
                await self._push(store, session, event)

    def _due(self, store: AuditStore) -> Sequence[Event]:
        """Return events to push now, oldest first; none if another process has the lease."""
        now = datetime.now(UTC)
        with store.connect(STORE_S) as connection:
            if not store.take_lease(connection, LEASE, self._owner, now, LEASE_S):
                self._measure(0, 0.0)
                return []
            count, oldest = connection.execute(_WAITING).one()
            self._measure(count, (now - oldest).total_seconds() if oldest else 0.0)
            if not count:
                self._logged = None
            found = connection.execute(_QUEUED.where(pushes.c.due <= now)).mappings().all()
        return [Event(Row(**{n: row[n] for n in NAMES}), row["attempts"]) for row in found]

    def _measure(self, count: int, lag_s: float) -> None:
        self._metrics.push_pending.set(count)
        self._metrics.push_lag.set(max(0.0, lag_s))

    async def _push(self, store: AuditStore, session: aiohttp.ClientSession, event: Event) -> None:
        """Push an event; take it out of the queue, or put it off if it was refused."""
        try:
            status = await self._post(session, event.row)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            status, reason = None, type(error).__name__
        else:
            reason = f"status {status}"
        delivered = status is not None and 200 <= status < 300
        self._metrics.pushed["delivered" if delivered else "failed"].inc()
        mine = pushes.c.input == event.row.id
        wait = timedelta(seconds=min(2.0**event.attempts, LONGEST_BACKOFF_S))
        later = {"attempts": event.attempts + 1, "due": datetime.now(UTC) + wait}
        with store.connect(STORE_S) as connection:
            if delivered:
                connection.execute(sa.delete(pushes).where(mine))
            else:
                connection.execute(sa.update(pushes).where(mine).values(**later))
        if delivered:
            self._logged = None
            return
        if status is None or status >= 500 or status in LATER:
            raise ReceiverFails(reason)
        self._log(reason)

    async def _post(self, session: aiohttp.ClientSession, row: Row) -> int:
        body = json.dumps(cloud_event(row), ensure_ascii=False, separators=(",", ":")).encode()
        headers = {"content-type": "application/cloudevents+json; charset=utf-8"}
        headers |= signature(self._key, row.id, int(datetime.now(UTC).timestamp()), body)
        posting = session.post(self._receiver, data=body, headers=headers, allow_redirects=False)
        async with posting as answer:
            return answer.status

    def _fail(self, error: Exception) -> None:
        self._failures = min(self._failures + 1, 10)
        known = isinstance(error, AuditError | ReceiverFails)
        self._log(str(error) if known else type(error).__name__)

    def _log(self, reason: str) -> None:
        if reason != self._logged:
            log.error("findings cannot be pushed", extra={"error": reason})
        self._logged = reason


def cloud_event(row: Row) -> dict[str, object]:
    """Return a finding as a CloudEvent 1.0, without the text and what could tell it."""
    data = {name: value for name, value in as_json(row).items() if name not in PRIVATE}
    return {
        "specversion": "1.0",
        "id": str(row.id),
        "source": f"/psim-gateway/models/{quote(row.model or '', safe='')}",
        "type": TYPE,
        "subject": row.request_id,
        "time": row.time.isoformat(),
        "datacontenttype": "application/json",
        "data": data,
    }


def signature(key: bytes, id: UUID, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers by which a receiver knows the sender, as Standard Webhooks says.

    Args:
        key: of the HMAC.
        id: of the event.
        timestamp: seconds since 1970, so that a receiver can refuse what is sent again much later.
        body: what is sent.
    """
    signed = f"{id}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {
        "webhook-id": str(id),
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }


_WAITING = sa.select(sa.func.count(), sa.func.min(pushes.c.time)).select_from(pushes)
_QUEUED = (
    sa.select(*(inputs.c[name] for name in NAMES), pushes.c.attempts)
    .join_from(pushes, inputs, pushes.c.input == inputs.c.id)
    .order_by(pushes.c.due, pushes.c.input)
    .limit(BATCH)
)
