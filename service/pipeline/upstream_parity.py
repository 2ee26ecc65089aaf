"""Whether the upstream is the model that the bundle screens for.

A screen knows how clean texts look to one classifier, the bundle's victim. In front of another one
it protects nothing. So both classify the bundle's carriers now and then: short clean texts of which
the victim is sure, so that rounding changes no label.
"""

import asyncio
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum

from models.bundle.load import Bundle
from models.detection.views import FIRES
from models.errors import PsimError
from service.classifiers.upstream import Incomparable, UpstreamClassifier
from service.errors import Invalid, ServiceError
from service.inference.batcher import Batcher
from service.observability.metrics import ModelMetrics
from service.schemas import Score
from service.settings import UpstreamSettings

log = logging.getLogger(__name__)

BATCH = 8
"""Texts per request; an upstream that refuses so many gets half of them, and so on."""
RETRY_S = 30
"""Longest pause after a comparison that failed, or that keeps the gateway from serving."""

Scores = Mapping[str, float]
"""Scores of a text by label."""


class ParityState(StrEnum):
    """What is known of an upstream."""

    OFF = "off"
    NO_CARRIERS = "no_carriers"
    """The bundle has no texts to compare with."""
    PENDING = "pending"
    """There was no answer yet."""
    COMPARED = "compared"
    INCOMPARABLE = "incomparable"
    """Its answers give no scores of the bundle's classes."""


@dataclass(frozen=True, slots=True)
class UpstreamParity:
    """Outcome of the latest comparison that had one."""

    state: ParityState
    texts: int = 0
    """Carriers that were compared."""
    same: float | None = None
    """Share of them that get the same label from both; of a multi-label classifier, all labels."""
    largest_difference: float | None = None
    """Of any score; None unless the upstream gives a score for every label of every carrier."""
    detail: str | None = None
    """Why the answers cannot be compared; it holds no text."""


class ParityCheck:
    """Compares the upstream with the bundle's victim: at start, after outages, and periodically.

    Raises:
        PsimError: a least parity is set, and nothing would ever be compared.
    """

    def __init__(
        self,
        bundle: Bundle,
        batcher: Batcher,
        upstream: UpstreamClassifier,
        settings: UpstreamSettings,
        metrics: ModelMetrics,
    ) -> None:
        self._metrics = metrics
        self._texts, self._labels = bundle.carriers, bundle.manifest.labels
        self._multi_label = bundle.manifest.multi_label
        self._batcher, self._upstream = batcher, upstream
        self._period, self._least = settings.upstream_parity_s, settings.upstream_parity_min
        self._own: list[Scores] = []
        """The victim's scores of the carriers, once they were asked for."""
        self._watcher: asyncio.Task[None] | None = None
        self.latest = UpstreamParity(self._initial_state)
        if self._least and self.latest.state is not ParityState.PENDING:
            raise PsimError(
                "PSIM_UPSTREAM_PARITY_MIN needs PSIM_UPSTREAM_PARITY_S above 0"
                if self.latest.state is ParityState.OFF
                else "PSIM_UPSTREAM_PARITY_MIN needs carriers, and the bundle has none: run "
                "`psim fit` with --carriers, or set PSIM_UPSTREAM_PARITY_MIN=0"
            )

    async def start(self) -> None:
        """Begin to compare; if it decides whether to serve, end the first comparison first."""
        if self.latest.state is not ParityState.PENDING:
            return
        pause = self._period
        if self._least and self._upstream.back.is_set():
            self._upstream.back.clear()
            pause = await self._compare()
        self._watcher = asyncio.create_task(self._watch(pause))

    async def close(self) -> None:
        """Stop comparing."""
        if self._watcher:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])

    @property
    def unready_reason(self) -> str | None:
        """Why nothing is to be forwarded; None if it may be."""
        latest = self.latest
        if not self._least or (latest.same is not None and latest.same >= self._least):
            return None
        if latest.same is not None:
            same = round(latest.same * latest.texts)
            return (
                f"the upstream and the bundle's model give the same label to {same} of "
                f"{latest.texts} carriers; PSIM_UPSTREAM_PARITY_MIN is {self._least:g}"
            )
        if latest.detail:
            return f"the upstream cannot be compared with the bundle's model: {latest.detail}"
        return "the upstream has not been compared with the bundle's model yet"

    @property
    def _initial_state(self) -> ParityState:
        if not self._period:
            return ParityState.OFF
        return ParityState.PENDING if self._texts else ParityState.NO_CARRIERS

    async def _watch(self, pause: float) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._upstream.back.wait()
            self._upstream.back.clear()
            pause = await self._compare() if self._upstream.ready else self._period

    async def _compare(self) -> float:
        """Compare now; return the seconds until the next time.

        If it fails, it says nothing of the models, and what was known of them stays.
        """
        soon = min(self._period, RETRY_S)
        try:
            self._own = self._own or await self._victim_scores()
            self.latest = self._parity(await self._upstream_scores())
        except Incomparable as error:
            self.latest = UpstreamParity(ParityState.INCOMPARABLE, detail=str(error))
        except ServiceError as error:
            log.warning("the upstream could not be compared: %s", error)
            self._metrics.upstream_parity_failures.inc()
            return soon
        except Exception as error:
            # Only place and type: the message may quote anything. A bug must not end the watch.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("bug", extra={"error": type(error).__name__, "where": where})
            self._metrics.upstream_parity_failures.inc()
            return soon
        log.info("upstream compared", extra=asdict(self.latest))
        return soon if self.unready_reason else self._period

    async def _victim_scores(self) -> list[Scores]:
        scores: list[Scores] = []
        for part in _batches(self._texts):
            screened = await self._batcher.screen(part)
            answers = await self._batcher.classify([one.value.state for one in screened])
            scores += [dict(zip(self._labels, one.value.tolist(), strict=True)) for one in answers]
        return scores

    async def _upstream_scores(self) -> list[Scores]:
        scores: list[Scores] = []
        for part in _batches(self._texts):
            scores += [_by_label(row) for row in await self._ask(part)]
        return scores

    async def _ask(self, texts: Sequence[str]) -> list[list[Score]]:
        try:
            return await self._upstream.scores(texts)
        except Invalid:
            if len(texts) == 1:
                raise
        half = len(texts) // 2
        return await self._ask(texts[:half]) + await self._ask(texts[half:])

    def _parity(self, found: Sequence[Scores]) -> UpstreamParity:
        pairs = [*zip(self._own, found, strict=True)]
        same = sum(self._agree(own, theirs) for own, theirs in pairs)
        complete = all(len(theirs) == len(self._labels) for theirs in found)
        differences = [
            abs(own[label] - score) for own, row in pairs for label, score in row.items()
        ]
        largest = max(differences) if complete else None
        return UpstreamParity(ParityState.COMPARED, len(pairs), same / len(pairs), largest)

    def _agree(self, own: Scores, theirs: Scores) -> bool:
        if self._multi_label:
            return all((own[label] >= FIRES) == (score >= FIRES) for label, score in theirs.items())
        return max(own, key=own.__getitem__) == max(theirs, key=theirs.__getitem__)


def publish(parity: UpstreamParity | None, metrics: ModelMetrics) -> None:
    """Set the gauges; what is not known is NaN, which fires no alert."""
    known = parity or UpstreamParity(ParityState.OFF)
    metrics.upstream_parity.set(math.nan if known.same is None else known.same)
    metrics.upstream_parity_texts.set(known.texts)
    difference = known.largest_difference
    metrics.upstream_parity_difference.set(math.nan if difference is None else difference)
    metrics.upstream_incomparable.set(known.state is ParityState.INCOMPARABLE)


def _by_label(row: Sequence[Score]) -> Scores:
    return {score.label: score.score for score in row}


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
