"""The way of a request: screen, decide, classify. Read this first.

Fail-closed by shape: an exception while screening leaves `handle` before the victim is called.
"""

import logging
from collections.abc import Iterator, Sequence

from models.bundle import Bundle
from models.screen import FloatArray, Verdict
from service.batcher import Batcher, Screened
from service.errors import ScreenFailed
from service.metrics import Metrics
from service.recorder import Entry
from service.schemas import Decision, Result, Score, ScreenResult
from service.settings import Mode
from service.victim import Victim

log = logging.getLogger(__name__)


def decide(verdict: Verdict | None, mode: Mode) -> Decision:
    """Return what to do with an input; without a verdict it got here only by failing open."""
    if verdict is None or not verdict.poisoned or mode is Mode.SHADOW:
        return Decision.ALLOW
    return Decision.REJECT if mode is Mode.ENFORCE else Decision.FLAG


class Gateway:
    """Screens every input before the victim sees it."""

    def __init__(
        self,
        bundle: Bundle,
        batcher: Batcher,
        victim: Victim,
        metrics: Metrics,
        mode: Mode,
        *,
        fail_open: bool = False,
    ) -> None:
        self.bundle, self.mode = bundle, mode
        self._batcher, self._victim, self._metrics = batcher, victim, metrics
        self._fail_open = fail_open
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
        pairs = list(zip(screened, decisions, strict=True))
        accepted = [s for s, decision in pairs if decision is not Decision.REJECT]
        rows = iter(await self._classified(entry, accepted))
        self._count_unscreened(accepted)
        entry.decisions = decisions
        return [self._result(s, decision, rows, top_k) for s, decision in pairs]

    async def screen(self, entry: Entry, texts: Sequence[str]) -> list[ScreenResult]:
        """Screen the texts and stop there.

        Raises:
            Overloaded, NotReady, ScreenFailed: nothing of the request is answered.
        """
        screened = await self._screened(entry, texts)
        if any(s.verdict is None for s in screened):
            raise ScreenFailed("an input could not be screened")
        return [_wire(s.verdict) for s in screened if s.verdict is not None]

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

    async def _screened(self, entry: Entry, texts: Sequence[str]) -> list[Screened]:
        answers = await self._batcher.screen(texts)
        entry.time([answer.stages for answer in answers])
        screened = [answer.value for answer in answers]
        entry.verdicts = [s.verdict for s in screened if s.verdict is not None]
        if len(entry.verdicts) < len(screened) and not self._fail_open:
            raise ScreenFailed("an input could not be screened, so none was classified")
        return screened

    def _count_unscreened(self, classified: Sequence[Screened]) -> None:
        unscreened = sum(s.verdict is None for s in classified)
        if unscreened:
            self._metrics.fail_open.inc(unscreened)
            log.warning("fail open: inputs passed unscreened", extra={"inputs": unscreened})

    async def _classified(self, entry: Entry, accepted: Sequence[Screened]) -> list[FloatArray]:
        answers = await self._victim.classify(accepted) if accepted else []
        entry.time([answer.stages for answer in answers])
        return [answer.value for answer in answers]

    def _result(
        self, screened: Screened, decision: Decision, rows: Iterator[FloatArray], top_k: int | None
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
            decision=decision, screen=screen, label=scores[0].label, scores=scores[:top_k]
        )


def _wire(verdict: Verdict) -> ScreenResult:
    return ScreenResult.model_validate(verdict, from_attributes=True)
