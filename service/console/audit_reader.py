"""Access of the pages to the audit: off the event loop, few at a time, in bounded time."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

import sqlalchemy as sa

from service.audit.rows import Mark, Row
from service.audit.store import AuditStore, inputs

Answer = TypeVar("Answer")

SECONDS = 20.0
"""Time for one transaction."""
AT_ONCE = 2


class Audit:
    """Opens nothing until it is used.

    Raises from all methods:
        AuditError: the audit cannot be used, or not in time.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def read(self, query: Callable[[sa.Connection], Answer]) -> Answer:
        """Run a function that only reads."""
        return await self._run(query, read_only=True)

    async def write(self, change: Callable[[sa.Connection], Answer]) -> Answer:
        """Run a function that writes, in one transaction."""
        return await self._run(change, read_only=False)

    async def marked(self) -> Iterator[Row]:
        """Return all marked inputs, read one by one."""
        # Errors are to come now, not while the rows are sent.
        await self.read(lambda connection: connection.scalar(sa.select(inputs.c.id).limit(1)))

        def rows() -> Iterator[Row]:
            with closing(AuditStore(self._url, read_only=True)) as store:
                yield from store.read(marks=[*Mark])

        return rows()

    async def _run(self, work: Callable[[sa.Connection], Answer], read_only: bool) -> Answer:
        def run() -> Answer:
            if not read_only:  # SQLite would create a file that is missing; a reader checks
                AuditStore(self._url, read_only=True).close()
            with (
                closing(AuditStore(self._url, read_only)) as store,
                store.connect(SECONDS) as connection,
            ):
                return work(connection)

        async with self._slots:
            return await asyncio.to_thread(run)
