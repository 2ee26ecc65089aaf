"""Waiting until something is so, with a limit: never for a fixed time."""

import asyncio
import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the condition holds; a refused connection is none that holds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the condition holds, and let other tasks run."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.002)
