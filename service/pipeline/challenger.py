"""A bundle on trial: it screens what the served one has screened, beside the traffic.

Its verdicts change no answer, and no request waits for them: what it cannot keep up with is
dropped and counted.
"""

import asyncio
import logging
import math

from models.bundle.load import Bundle
from service.errors import ServiceError
from service.inference.batcher import Batcher, Screener
from service.observability.metrics import Metrics, ModelMetrics
from service.pipeline.request_record import RequestRecord
from service.pipeline.windows import WindowedScreener
from service.settings import InferenceSettings, ModelSettings

log = logging.getLogger(__name__)

WAITING = 256
"""Inputs that may wait for the challenger; more are dropped."""


class Challenger:
    """Counts how the verdicts of another bundle differ from those of the served one."""

    def __init__(
        self, bundle: Bundle, settings: InferenceSettings, max_windows: int, metrics: ModelMetrics
    ) -> None:
        self.digest = bundle.digest
        own = settings.model_copy(update={"queue_inputs": WAITING, "queue_s": math.inf})
        # Its queue and times are nobody's business: they would count as those of the model.
        self._batcher = Batcher(bundle, own, Metrics().of("challenger", ModelSettings()))
        self._windowed_screener = WindowedScreener(
            self._batcher, bundle.manifest.max_length, max_windows
        )
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start its worker, and screen something.

        Raises:
            NotReady, ScreenFailed: it cannot.
        """
        self._batcher.start()
        await self._batcher.screen(["warm up"])

    async def close(self) -> None:
        """End its worker; what waits for it is not worth waiting for."""
        for task in self._tasks:
            task.cancel()
        await self._batcher.close()

    def compare(self, entry: RequestRecord, whole: bool) -> None:
        """Screen the texts of a request too, later; to their end if the served bundle did so."""
        screener: Screener = self._windowed_screener if whole else self._batcher
        task = asyncio.create_task(self._compare(screener, entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, screener: Screener, entry: RequestRecord) -> None:
        try:
            found = [answer.value.verdict for answer in await screener.screen(entry.texts)]
        except ServiceError:
            self._metrics.challenger_dropped.inc(len(entry.texts))
            return
        for number, (served, own) in enumerate(zip(entry.verdicts, found, strict=True)):
            if served is None or own is None:
                self._metrics.challenger_dropped.inc()
                continue
            self._metrics.challenger_inputs[served.poisoned, own.poisoned].inc()
            self._metrics.challenger_score.observe(own.score)
            if served.poisoned is not own.poisoned:
                scores = {"served": served.score, "challenger": own.score}
                where = {"request_id": entry.request_id, "number": number}
                log.info("the challenger disagrees", extra=where | scores)
