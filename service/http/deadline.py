"""Limits to the time of a request: its deadline, and its caller's patience."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.errors import TimedOut

Answer = TypeVar("Answer")


async def while_connected(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Return the answer.

    Raises:
        ClientDisconnect: the caller hung up, so the work was cancelled.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        watch.cancel()
        if work.cancel():
            await asyncio.wait((work,))


class Deadline:
    """Context that raises `TimedOut` when its time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise TimedOut(f"no answer within {self._seconds} s") from None
