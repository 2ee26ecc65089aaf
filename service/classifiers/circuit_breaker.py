"""A circuit breaker: callers of an upstream that is down fail at once instead of waiting."""

import time
from collections.abc import Callable


class CircuitBreaker:
    """Opens after `FAILURES` in a row; while open, admits one attempt every `pause_s` seconds."""

    FAILURES = 5

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s, self._clock = pause_s, clock
        self._failures, self._retry_at = 0, 0.0

    @property
    def open(self) -> bool:
        """Whether the upstream counts as down."""
        return self._failures >= self.FAILURES

    def admit(self) -> bool:
        """Return whether an attempt may be made now."""
        if self.open:
            if self._clock() < self._retry_at:
                return False
            self._retry_at = self._clock() + self._pause_s
        return True

    def record(self, failed: bool) -> None:
        """Record the outcome of an attempt."""
        self._failures = self._failures + 1 if failed else 0
        if failed and self.open:
            self._retry_at = self._clock() + self._pause_s
