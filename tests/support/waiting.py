"""Waiting until something is so, with a limit: never for a fixed time."""

import asyncio
import inspect
import time
from collections.abc import Callable

import httpx


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition holds; a refused connection is none that holds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (OSError, httpx.TransportError):
            pass
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait as `wait_for` does while other tasks run; the condition may be a coroutine."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
        except (OSError, httpx.TransportError):
            pass
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.002)
