"""Rate limits of API keys in passes, counted in this process or, for all replicas, in Redis.

A pass screens what the model reads at once: a short text, or a window of a long one.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from limits import RateLimitItem
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from models.errors import PsimError
from service.errors import RateLimited, TooLarge
from service.observability.metrics import AccessMetrics

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

log = logging.getLogger(__name__)

SHARED_S = 0.25
"""Time for Redis to answer."""
PAUSE_S = 5.0
"""Pause before Redis is used again after a failure."""


class Limiter:
    """Counts passes over a sliding window.

    While Redis fails, each replica counts for itself: a key may then use its rate at each of them,
    within the limits of their queues. Refusing all requests would let Redis stop the screening.

    Args:
        url: of Redis; None counts in this process.
        metrics: counts refused passes and failures of Redis.
        clock: monotonic seconds.

    Raises:
        PsimError: the client for Redis is not installed, or it does not accept the URL.
    """

    def __init__(
        self, url: str | None, metrics: AccessMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self._pool: ConnectionPool | None = None
        if url:
            self._pool = _pool(url)
            self._shared = SlidingWindowCounterRateLimiter(_storage(url, self._pool))
        self._metrics, self._clock = metrics, clock
        self._shared_after = 0.0

    async def take(self, name: str, rate: RateLimitItem, passes: int, before: int = 0) -> None:
        """Count the next passes of a request against the rate of a key.

        Args:
            name: of the key.
            rate: of the key.
            passes: that are run next.
            before: passes that the request has cost already.

        Raises:
            TooLarge: the request costs more than the rate ever allows at once.
            RateLimited: the passes are more than the rate allows now.
        """
        if before + passes > rate.amount:
            raise TooLarge(
                f"the request takes {before + passes} passes or more, over the key's limit of "
                f"{rate}: send fewer or shorter texts at once"
            )
        wait_s = await self._wait(name, rate, passes)
        if wait_s:
            self._metrics.rate_limited.inc(passes)
            raise RateLimited(str(rate), wait_s)

    async def _wait(self, name: str, rate: RateLimitItem, passes: int) -> int:
        """Count passes and return 0, or return the seconds until there may be room for them."""
        if self._shared and self._clock() >= self._shared_after:
            try:
                async with asyncio.timeout(SHARED_S):
                    return await _take(self._shared, name, rate, passes)
            except (StorageError, TimeoutError) as error:
                self._shared_after = self._clock() + PAUSE_S
                self._metrics.limits_failures.inc()
                # Only the type: messages may quote the URL.
                kind = type(error.__cause__ or error).__name__
                log.error("Redis fails, limits are each replica's own", extra={"error": kind})
        return await _take(self._own, name, rate, passes)

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool:
            await self._pool.aclose()


async def _take(
    limiter: SlidingWindowCounterRateLimiter, name: str, rate: RateLimitItem, passes: int
) -> int:
    if await limiter.hit(rate, name, cost=passes):
        return 0
    stats = await limiter.get_window_stats(rate, name)
    return max(1, math.ceil(stats.reset_time - time.time()))  # noqa: TID251 - as it counts


def _pool(url: str) -> "ConnectionPool":
    try:
        from redis.asyncio import ConnectionPool
    except ImportError as error:
        raise PsimError(
            "PSIM_LIMITS_URL needs Redis' client: install psim-gateway[redis]"
        ) from error
    try:
        return ConnectionPool.from_url(url)
    except ValueError:
        raise PsimError("PSIM_LIMITS_URL is no URL of Redis, redis://host:6379/0") from None


def _storage(url: str, pool: "ConnectionPool") -> Storage:
    options: dict[str, Any] = {"connection_pool": pool}  # documented, but missing in its type
    return RedisStorage(
        f"async+{url}", True, implementation="redispy", key_prefix="psim", **options
    )
