"""How promptly the event loop runs: what blocks it delays every request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from prometheus_client import Histogram

INTERVAL_S = 0.25
"""Time between two measurements, each of which costs some microseconds."""


@asynccontextmanager
async def measured_event_loop(lag: Histogram) -> AsyncIterator[None]:
    """Observe the running loop's lag in seconds, in a task, while the block runs."""
    task = asyncio.create_task(_measure(lag))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _measure(lag: Histogram) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        # The loop may wake a task early, by the resolution of its clock.
        lag.observe(max(0.0, loop.time() - due))
