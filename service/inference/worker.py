"""The inference thread, supervised: restarted when it dies, given up when that does not help.

It may die of a bug of ours, or because the engine fails on every input; the batcher handles single
inputs that the engine cannot take. A forward pass that hangs cannot be ended from inside this
process: it is noticed, and `Health` reports it.
"""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from service.observability.metrics import ModelMetrics
from service.settings import WorkerSettings

log = logging.getLogger(__name__)

WINDOW_S, BACK_OFF_S = 60.0, 0.1
"""Deaths within this time count together; the pause before a restart doubles with each."""
STEP_S = 2.0
"""Time that the step at hand has once the worker's time to drain is over."""


class Health(StrEnum):
    """State of the worker; the value completes a sentence that starts "the inference worker"."""

    STARTING = "has not started"
    RUNNING = "is running"
    RESTARTING = "died and is being restarted"
    STALLED = "hangs in a forward pass: restart the process"
    DEAD = "died too often: restart the process"
    CLOSING = "is draining"

    @property
    def unrecoverable(self) -> bool:
        """True if only a new process helps."""
        return self in (Health.STALLED, Health.DEAD)


class Worker:
    """A thread that calls `step` until it returns False.

    Args:
        step: does some work; an exception is the worker's death.
        probe: raises unless work can be done; called before `step` after a death.
        fail_taken: called after each death, to fail the jobs that were worked on.
        fail_all: called when there will be no more steps, to fail all jobs.
        settings: limits of restarts and hangs.
        metrics: counts restarts.
    """

    def __init__(
        self,
        step: Callable[[], bool],
        probe: Callable[[], None],
        fail_taken: Callable[[], None],
        fail_all: Callable[[], None],
        settings: WorkerSettings,
        metrics: ModelMetrics,
    ) -> None:
        self._step, self._probe = step, probe
        self._fail_taken, self._fail_all = fail_taken, fail_all
        self._settings, self._metrics = settings, metrics
        self._health = Health.STARTING
        self.wake = threading.Condition()
        """Hold it to queue or take work; it is notified of new work and of closing."""
        self.closing = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._health = Health.RUNNING
        self._thread.start()

    @property
    def health(self) -> Health:
        """State of the worker now."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._settings.stall_s:
            return Health.STALLED
        if self.closing and self._health is not Health.DEAD:
            return Health.CLOSING
        return self._health

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Mark a call that may hang."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    async def close(self, seconds: float) -> None:
        """Let the worker finish all queued jobs; fail them after so many seconds.

        It may end its step then, since a process that ends inside PyTorch aborts; after `STEP_S`
        more it is abandoned.
        """
        with self.wake:
            self.closing = True
            self.wake.notify()
        if not await self._ends_within(seconds):
            self._fail_all()
            if not await self._ends_within(STEP_S):
                log.error("the inference worker did not end in time and is abandoned")
        await asyncio.sleep(0)  # lets posted answers reach their futures

    async def _ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._supervise()
        finally:
            with self.wake:
                if not self.closing:
                    self._health = Health.DEAD
            self._fail_all()

    def _supervise(self) -> None:
        deaths: list[float] = []
        while True:
            try:
                if deaths:
                    self._probe()
                    self._health = Health.RUNNING
                while self._step():
                    pass
                return
            except BaseException as error:
                # Only place and type: the message may quote a text.
                where = "".join(traceback.format_tb(error.__traceback__))
                fields = {"error": type(error).__name__, "where": where}
                log.error("the inference worker died", extra=fields)
            now = time.monotonic()
            deaths = [*(died for died in deaths if now - died < WINDOW_S), now]
            if self.closing or len(deaths) > self._settings.restarts:
                return
            self._health = Health.RESTARTING
            self._fail_taken()
            self._metrics.worker_restarts.inc()
            with self.wake:
                pause = BACK_OFF_S * 2 ** (len(deaths) - 1)
                self.wake.wait_for(lambda: self.closing, pause)
