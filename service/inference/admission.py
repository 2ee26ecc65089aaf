"""Decides which texts may be queued, and when a refused caller may come back."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service.errors import Overloaded
from service.observability.metrics import ModelMetrics
from service.settings import QueueSettings

Answers = tuple["asyncio.Future[Any]", ...]


class Admission:
    """Counts what waits or runs, and refuses what would not be answered in time.

    The texts of a request are admitted together or not at all. All must hold:

    - with them, at most `queue_inputs` texts wait or run;
    - with them, at most `queue_chars` characters do;
    - the work that goes before the last of them takes at most `queue_s` seconds by the latest pace.

    Callers take turns, text by text. So of each caller's unanswered texts, only as many go before
    the new ones as there are new ones. The third rule does not apply while waiting and new texts
    together are at most `window`: batches are made of so many, and slow models need them too.

    Methods are called on the event loop, except `measure`.
    """

    def __init__(self, settings: QueueSettings, metrics: ModelMetrics, window: int) -> None:
        self._settings, self._metrics, self._window = settings, metrics, window
        self._inputs = self._characters = 0
        self._callers: set[Answers] = set()
        self._pace = 0.0
        """Seconds per text, averaged over the latest `window` of them or so."""
        metrics.max_queue_inputs.set(settings.queue_inputs)
        metrics.max_queue_characters.set(settings.queue_chars)
        metrics.max_queue_seconds.set(settings.queue_s)

    @property
    def characters(self) -> int:
        """How many characters wait or run."""
        return self._characters

    @contextmanager
    def admit(self, answers: Answers, characters: int) -> Iterator[None]:
        """Count the texts of a request as queued while the block runs.

        Args:
            answers: one for each text.
            characters: of all texts.

        Raises:
            Overloaded: they may not be queued.
        """
        inputs = len(answers)
        for reason, amount, limit in (
            ("inputs", self._inputs + inputs, self._settings.queue_inputs),
            ("characters", self._characters + characters, self._settings.queue_chars),
            ("seconds", self._seconds_before(inputs), self._settings.queue_s),
        ):
            if amount > limit:
                self._metrics.overload[reason].inc()
                raise Overloaded(reason, self._retry_after())
        self._count(inputs, characters)
        self._callers.add(answers)
        try:
            yield
        finally:
            self._callers.discard(answers)
            self._count(-inputs, -characters)

    def measure(self, seconds: float, inputs: int) -> None:
        """Update the pace by a step that screened `inputs` texts; called in the inference thread.

        A step that only classifies counts for texts that were screened before: each takes both.
        """
        self._pace += (seconds - inputs * self._pace) / self._window

    def _seconds_before(self, inputs: int) -> float:
        """Return how many seconds of work go before the last of `inputs` texts of a new caller."""
        if self._inputs + inputs <= self._window:
            return 0.0
        unanswered = (sum(not one.done() for one in answers) for answers in self._callers)
        return self._pace * sum(min(inputs, count) for count in unanswered)

    def _retry_after(self) -> int:
        """Return in how many seconds everything that waits now will be answered."""
        seconds = min(self._pace * self._inputs, self._settings.request_timeout_s)
        return max(1, math.ceil(seconds))

    def _count(self, inputs: int, characters: int) -> None:
        self._inputs += inputs
        self._characters += characters
        # Not `set`: after a reload, the batcher before may still hold inputs of the same model.
        self._metrics.queue_inputs.inc(inputs)
        self._metrics.queue_characters.inc(characters)
        self._metrics.queue_seconds.set(self._pace * self._inputs)
