"""Limits to the time of a request: its deadline, and its caller's patience."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from service.errors import TimedOut

PATIENCE_S = 0.25
"""For how long a request runs before its caller is watched."""


class WhileConnected:
    """Context that cancels what runs in it when the caller hangs up: it raises `ClientDisconnect`.

    The caller is watched from `PATIENCE_S` on. Most requests are answered sooner, and need no task
    that watches.

    Args:
        request: its body has been read.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._watch: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we are in one
        self._task, self._cancelling = task, task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._start)

    async def __aexit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._timer.cancel()
        if self._watch:
            self._watch.cancel()
        # As `asyncio.timeout` does: somebody else may have cancelled the task too.
        alone = self._gone and self._task.uncancel() <= self._cancelling
        if alone and kind is asyncio.CancelledError:
            raise ClientDisconnect

    def _start(self) -> None:
        self._watch = asyncio.create_task(self._cancel_when_gone())

    async def _cancel_when_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()


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
