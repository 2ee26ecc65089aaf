"""A circuit breaker: callers of an upstream that is down fail at once instead of waiting."""

import asyncio


class CircuitBreaker:
    """Whether an upstream counts as down.

    Requests that fail only raise a suspicion: one caller's texts may be too slow, or too heavy.
    Then the service asks with a text of its own, and that alone opens the circuit, and closes it.
    """

    FAILURES = 5
    """Failed requests in a row that raise a suspicion."""

    def __init__(self) -> None:
        self.open = False
        """Whether the upstream counts as down."""
        self.suspected = asyncio.Event()
        """Set while the upstream is to be asked."""
        self._failures = 0

    def record(self, failed: bool) -> None:
        """Record the outcome of a caller's request."""
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= self.FAILURES:
            self.suspected.set()

    def probed(self, answers: bool) -> None:
        """Record whether the upstream answers the service."""
        self.open, self._failures = not answers, 0
        if answers:
            self.suspected.clear()
        else:
            self.suspected.set()
