"""The way of a request: screen, decide, sanitize if asked to, classify. Read this first.

Fail-closed by shape: an exception while screening leaves `handle` before the victim is called.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from models.bundle import Bundle
from models.explain import Span
from models.screen import FloatArray, Verdict
from service.batcher import Batcher, Screened
from service.errors import Overloaded, ScreenFailed
from service.explainer import Cleaned, Explainer
from service.metrics import Metrics
from service.recorder import Entry
from service.schemas import (
    Decision,
    ExplainResponse,
    Removed,
    Result,
    Score,
    ScreenResult,
    WeightedWord,
)
from service.settings import Mode, Settings
from service.victim import Victim
from service.worker import Health

log = logging.getLogger(__name__)


def decide(verdict: Verdict | None, mode: Mode) -> Decision:
    """Return what to do with an input; without a verdict it got here only by failing open."""
    if verdict is None or not verdict.poisoned or mode is Mode.SHADOW:
        return Decision.ALLOW
    return Decision.FLAG if mode is Mode.FLAG else Decision.REJECT


class Gateway:
    """Screens every input before the victim sees it."""

    def __init__(
        self,
        bundle: Bundle,
        batcher: Batcher,
        victim: Victim,
        explainer: Explainer,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self.bundle, self.mode = bundle, settings.mode
        self._batcher, self._victim, self._explainer = batcher, victim, explainer
        self._metrics, self._settings = metrics, settings
        self._warm = False

    async def handle(
        self, entry: Entry, texts: Sequence[str], top_k: int | None = None
    ) -> list[Result]:
        """Screen the texts, classify those that may pass, and answer in their order.

        Raises:
            Overloaded, NotReady, ScreenFailed, ClassifyFailed: nothing of the request is answered.
        """
        screened = await self._screened(entry, texts)
        decisions = [decide(s.verdict, self.mode) for s in screened]
        cleaned: dict[int, Cleaned] = {}
        if self.mode is Mode.SANITIZE:
            with entry.span("sanitize"):
                cleaned = await self._cleaned(entry, texts, screened)
            decisions = [Decision.SANITIZE if i in cleaned else d for i, d in enumerate(decisions)]
        accepted = [
            cleaned[i].screened if i in cleaned else screened[i]
            for i, decision in enumerate(decisions)
            if decision is not Decision.REJECT
        ]
        rows = iter(await self._classified(entry, accepted))
        self._count_unscreened(accepted)
        entry.decisions = decisions
        removed = [_removed(text, cleaned.get(i)) for i, text in enumerate(texts)]
        results = [
            self._result(*known, rows, top_k)
            for known in zip(screened, decisions, removed, strict=True)
        ]
        entry.labels = [result.label for result in results]
        return results

    async def screen(self, entry: Entry, texts: Sequence[str]) -> list[ScreenResult]:
        """Screen the texts and stop there.

        Raises:
            Overloaded, NotReady, ScreenFailed: nothing of the request is answered.
        """
        screened = await self._screened(entry, texts)
        if any(s.verdict is None for s in screened):
            raise ScreenFailed("an input could not be screened")
        return [_wire(s.verdict) for s in screened if s.verdict is not None]

    async def explain(self, text: str) -> ExplainResponse:
        """Say which words of a text the screen minds.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `Explainer.explain` does.
        """
        verdict, found = await self._explainer.explain(text)
        words = [
            WeightedWord(start=w.start, end=w.end, text=text[w.start : w.end], weight=w.weight)
            for w in found.words
        ]
        return ExplainResponse(
            bundle=self.bundle.digest,
            screen=_wire(verdict),
            words=words,
            removed=_parts(text, found.removed),
        )

    async def warm_up(self) -> None:
        """Prove with real forward passes that PSIM and the classifier answer; then be ready."""
        screened = await self._screened(Entry("", ""), ["warm up"])
        await self._classified(Entry("", ""), screened)
        self._warm = True
        self._metrics.ready.set(1)

    @property
    def ready(self) -> bool:
        """True if the gateway has proved to work and its worker lives."""
        ready = self._warm and self._batcher.alive
        self._metrics.ready.set(ready)
        return ready

    @property
    def health(self) -> Health:
        """How the inference worker is."""
        return self._batcher.health

    async def _screened(self, entry: Entry, texts: Sequence[str]) -> list[Screened]:
        with entry.span("screen"):
            answers = await self._batcher.screen(texts)
        entry.time([answer.stages for answer in answers])
        screened = [answer.value for answer in answers]
        entry.texts, entry.verdicts = texts, [s.verdict for s in screened]
        if None in entry.verdicts and not self._settings.fail_open:
            raise ScreenFailed("an input could not be screened, so none was classified")
        return screened

    async def _cleaned(
        self, entry: Entry, texts: Sequence[str], screened: Sequence[Screened]
    ) -> dict[int, Cleaned]:
        """Return what can be sanitized in time, by number; all else is left to be rejected."""
        cleaned: dict[int, Cleaned] = {}
        started = time.perf_counter()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.sanitize_s):
                for number, (text, one) in enumerate(zip(texts, screened, strict=True)):
                    if one.verdict is None or not one.verdict.poisoned:
                        continue
                    with suppress(Overloaded, ScreenFailed):
                        if found := await self._explainer.clean(text, one.verdict):
                            cleaned[number] = found
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds.labels("sanitize").observe(seconds)
        entry.time([{"sanitize": seconds}])
        return cleaned

    def _count_unscreened(self, classified: Sequence[Screened]) -> None:
        unscreened = sum(s.verdict is None for s in classified)
        if unscreened:
            self._metrics.fail_open.inc(unscreened)
            log.warning("fail open: inputs passed unscreened", extra={"inputs": unscreened})

    async def _classified(self, entry: Entry, accepted: Sequence[Screened]) -> list[FloatArray]:
        if not accepted:
            return []
        with entry.span("classify"):
            answers = await self._victim.classify(accepted)
        entry.time([answer.stages for answer in answers])
        return [answer.value for answer in answers]

    def _result(
        self,
        screened: Screened,
        decision: Decision,
        removed: list[Removed] | None,
        rows: Iterator[FloatArray],
        top_k: int | None,
    ) -> Result:
        screen = None if screened.verdict is None else _wire(screened.verdict)
        if decision is Decision.REJECT:
            return Result(decision=decision, screen=screen, label=None, scores=None)
        labels = self.bundle.manifest.labels
        scores = sorted(
            (
                Score(label=label, score=float(p))
                for label, p in zip(labels, next(rows), strict=True)
            ),
            key=lambda score: -score.score,
        )
        return Result(
            decision=decision,
            screen=screen,
            label=scores[0].label,
            scores=scores[:top_k],
            removed=removed,
        )


def _removed(text: str, cleaned: Cleaned | None) -> list[Removed] | None:
    return None if cleaned is None else _parts(text, cleaned.removed)


def _parts(text: str, spans: Sequence[Span]) -> list[Removed]:
    return [Removed(start=start, end=end, text=text[start:end]) for start, end in spans]


def _wire(verdict: Verdict) -> ScreenResult:
    return ScreenResult.model_validate(verdict, from_attributes=True)
