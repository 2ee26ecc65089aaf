"""A second bundle that screens live traffic for comparison with the served one.

Its verdicts change no answer, and no request waits for them: inputs that it cannot keep up with are
dropped and counted.
"""

import asyncio
import logging
import math
from collections.abc import Sequence

from models.bundle.load import Bundle
from models.detection.screen import Verdict
from service.errors import ScreenFailed, ServiceError
from service.inference.batcher import Batcher, Screener, free
from service.observability.metrics import Metrics, ModelMetrics
from service.pipeline.two_stage import TwoStageScreener
from service.pipeline.windows import WindowedScreener
from service.settings import ModelSettings, ScreeningSettings

log = logging.getLogger(__name__)

WAITING = 256
"""Inputs that may wait for the challenger; more are dropped."""


class Challenger:
    """Counts how the verdicts of another bundle differ from those of the served one."""

    def __init__(
        self, bundle: Bundle, settings: ScreeningSettings, max_windows: int, metrics: ModelMetrics
    ) -> None:
        self.digest = bundle.digest
        limits = settings.model_copy(update={"queue_inputs": WAITING, "queue_s": math.inf})
        # A registry of its own: its queue and times must not count as those of the served model.
        own_metrics = Metrics().of("challenger", ModelSettings())
        self._batcher = Batcher(bundle, limits, own_metrics)
        self._screener = TwoStageScreener(self._batcher, bundle, settings, own_metrics)
        self._windowed_screener = WindowedScreener(
            self._screener, bundle.manifest.max_length, max_windows
        )
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the worker, and screen a text.

        Raises:
            NotReady, ScreenFailed: the bundle does not work.
        """
        self._batcher.start()
        (answer,) = await self._batcher.screen(["warm up"])
        if answer.value.verdict is None:
            raise ScreenFailed("the challenger gives no verdict on the text that it is tried with")

    async def close(self) -> None:
        """Drop the waiting inputs, and end the worker."""
        for task in self._tasks:
            task.cancel()
        await self._batcher.close()

    def compare(
        self,
        request_id: str,
        texts: Sequence[str],
        verdicts: Sequence[Verdict | None],
        to_the_end: bool,
    ) -> None:
        """Screen texts later, to their end if the served bundle, whose verdicts these are, did."""
        screener: Screener = self._windowed_screener if to_the_end else self._screener
        task = asyncio.create_task(self._compare(screener, request_id, texts, verdicts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self,
        screener: Screener,
        request_id: str,
        texts: Sequence[str],
        verdicts: Sequence[Verdict | None],
    ) -> None:
        try:
            answers = await screener.screen(texts, free)
        except ServiceError:
            self._metrics.challenger_dropped.inc(len(texts))
            return
        found = [answer.value.verdict for answer in answers]
        for number, (served, own) in enumerate(zip(verdicts, found, strict=True)):
            if served is None or own is None:
                self._metrics.challenger_dropped.inc()
                continue
            self._metrics.challenger_inputs[served.finding, own.finding].inc()
            self._metrics.challenger_score.observe(own.score)
            if served.finding is not own.finding:
                where = {"request_id": request_id, "number": number}
                scores = {"served": served.score, "challenger": own.score}
                findings = {"served_finding": served.finding, "challenger_finding": own.finding}
                log.info("the challenger disagrees", extra=where | scores | findings)
