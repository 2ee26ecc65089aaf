"""The audit as pages ask it: off the event loop, few at a time, in bounded time."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

import sqlalchemy as sa

from service.audit.rows import Mark, Row
from service.audit.store import AuditStore, inputs

Answer = TypeVar("Answer")

SECONDS = 20.0
"""For a question."""
AT_ONCE = 2


class Audit:
    """Opens nothing until it is asked; its questions raise `AuditError`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def ask(self, question: Callable[[sa.Connection], Answer]) -> Answer:
        """Return the answer of a function that only reads."""
        return await self._run(question, read_only=True)

    async def change(self, what: Callable[[sa.Connection], Answer]) -> Answer:
        """Return the answer of a function that writes; all it does is done, or nothing."""
        return await self._run(what, read_only=False)

    async def marked(self) -> Iterator[Row]:
        """Return all inputs that are marked, read one by one."""
        await self.ask(lambda connection: connection.scalar(sa.select(inputs.c.id).limit(1)))

        def read() -> Iterator[Row]:
            with closing(AuditStore(self._url, read_only=True)) as store:
                yield from store.read(marks=[*Mark])

        return read()

    async def _run(self, question: Callable[[sa.Connection], Answer], read_only: bool) -> Answer:
        def run() -> Answer:
            if not read_only:  # a reader looks by itself: SQLite would make an empty file
                AuditStore(self._url, read_only=True).close()
            with (
                closing(AuditStore(self._url, read_only)) as store,
                store.connect(SECONDS) as connection,
            ):
                return question(connection)

        async with self._turn:
            return await asyncio.to_thread(run)
