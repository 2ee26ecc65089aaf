"""The way of a request: screen, decide, sanitize if asked to, classify. Read this first.

Fail-closed by shape: an exception while screening leaves `handle` before the victim is called.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from models.bundle.load import Bundle
from models.detection.explain import Span
from models.detection.screen import Verdict
from service.classifiers.base import Call, Input, Reply, Victim
from service.errors import Overloaded, ScreenFailed
from service.inference.batcher import Screened, Screener
from service.inference.worker import Health
from service.observability.drift import Drift
from service.observability.metrics import ModelMetrics
from service.pipeline.challenger import Candidate
from service.pipeline.request_record import Entry, Guard
from service.pipeline.trigger_search import Cleaned, Explainer
from service.protocols.base import Served
from service.schemas import (
    Decision,
    ExplainResponse,
    Removed,
    Result,
    Score,
    ScreenResult,
    WeightedWord,
)
from service.security.access import Caller
from service.settings import Mode, Settings

log = logging.getLogger(__name__)


def decide(verdict: Verdict | None, mode: Mode, whole: bool = False) -> Decision:
    """Return what to do with an input; without a verdict it got here only by failing open.

    If `whole`, an input that the screen has not read to its end is as bad as a poisoned one.
    """
    suspicious = verdict is not None and (verdict.poisoned or (verdict.truncated and whole))
    if not suspicious or mode is Mode.SHADOW:
        return Decision.ALLOW
    return Decision.FLAG if mode is Mode.FLAG else Decision.REJECT


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    results: Sequence[Result]
    """Of each input; without scores if there is a reply."""
    rejected: Sequence[int]
    """Numbers of the rejected inputs, from 0."""
    refused: bool
    """True if nothing of the request is answered, because of what was rejected."""
    reply: Reply | None = None
    """The upstream's answer, ready-made in the caller's dialect."""


class Gateway:
    """Screens every input before the victim sees it."""

    def __init__(
        self,
        bundle: Bundle,
        served: Served,
        screener: Screener,
        whole_texts: Screener,
        victim: Victim,
        explainer: Explainer,
        metrics: ModelMetrics,
        settings: Settings,
        candidate: Candidate | None = None,
    ) -> None:
        self._whole_texts = whole_texts
        self.bundle, self.served, self.mode = bundle, served, settings.mode
        self.drift = Drift(bundle)
        self._guard = Guard(served.model, bundle.digest, settings.mode, metrics, self.drift)
        self._screener, self._victim, self._explainer = screener, victim, explainer
        self._metrics, self._settings = metrics, settings
        self._candidate = candidate
        self.elsewhere = settings.upstream is not None
        self._whole = self.elsewhere and settings.unread == "reject"
        self._warm = False

    async def handle(self, entry: Entry, call: Call) -> Outcome:
        """Screen the texts, classify those that may pass, and answer in their order.

        Raises:
            ServiceError: nothing of the request is answered.
        """
        texts = call.asked.texts
        screened = await self._screened(entry, texts)
        decisions = [decide(s.verdict, self.mode, self._whole) for s in screened]
        cleaned: dict[int, Cleaned] = {}
        if self.mode is Mode.SANITIZE:
            with entry.span("sanitize"):
                cleaned = await self._cleaned(entry, texts, screened)
            decisions = [Decision.SANITIZE if i in cleaned else d for i, d in enumerate(decisions)]
        rejected = [i for i, d in enumerate(decisions) if d is Decision.REJECT]
        if rejected and (len(rejected) == len(texts) or not call.dialect.gaps):
            # The others get no answer either, so they do not count as allowed.
            entry.decisions = [d if d is Decision.REJECT else None for d in decisions]
            results = [
                _result(one, decision, None, [], entry.caller)
                for one, decision in zip(screened, decisions, strict=True)
            ]
            return Outcome(results, rejected, refused=True)
        passed = [i for i in range(len(texts)) if i not in rejected]
        accepted = [
            Input(cleaned[i].text, cleaned[i].screened)
            if i in cleaned
            else Input(texts[i], screened[i])
            for i in passed
        ]
        with entry.span("classify"):
            answer = await self._victim.classify(call, accepted)
        entry.time(answer.stages)
        self._count_unscreened([one.screened for one in accepted])
        entry.decisions = decisions
        scores = {} if answer.reply else dict(zip(passed, answer.scores, strict=True))
        results = [
            _result(
                screened[i],
                decision,
                _removed(texts[i], cleaned.get(i)),
                scores.get(i, [])[: call.asked.limit],
                entry.caller,
            )
            for i, decision in enumerate(decisions)
        ]
        entry.labels = [result.label for result in results]
        return Outcome(results, rejected, refused=False, reply=answer.reply)

    async def screen(self, entry: Entry, texts: Sequence[str]) -> list[ScreenResult]:
        """Screen the texts and stop there.

        Raises:
            Overloaded, NotReady, ScreenFailed: nothing of the request is answered.
        """
        screened = await self._screened(entry, texts)
        if any(s.verdict is None for s in screened):
            raise ScreenFailed("an input could not be screened")
        return [_wire(s.verdict, entry.caller) for s in screened if s.verdict is not None]

    async def judge(self, entry: Entry, texts: Sequence[str]) -> list[Decision]:
        """Decide on texts that somebody else forwards, to a classifier that may read all of them.

        Raises:
            Overloaded, NotReady, ScreenFailed: no text may pass.
        """
        screened = await self._screened(entry, texts, self._whole_texts)
        whole = self._settings.unread == "reject"
        decisions = [decide(s.verdict, self.mode, whole) for s in screened]
        entry.decisions = decisions
        self._count_unscreened(screened)
        return decisions

    async def explain(self, entry: Entry, text: str) -> ExplainResponse:
        """Say which words of a text the screen minds.

        Raises:
            Forbidden: the caller is not told scores, of which these would be the finest.
            TooLarge, RateLimited: as `Caller.take` does.
            Overloaded, NotReady, ScreenFailed: as `Explainer.explain` does.
        """
        entry.guard = self._guard
        entry.caller.require_scores()
        await entry.caller.take(1)
        verdict, found = await self._explainer.explain(text)
        words = [
            WeightedWord(start=w.start, end=w.end, text=text[w.start : w.end], weight=w.weight)
            for w in found.words
        ]
        return ExplainResponse(
            bundle=self.bundle.digest,
            screen=_wire(verdict, entry.caller),
            words=words,
            removed=_parts(text, found.removed),
        )

    async def start(self) -> None:
        """Prove with real forward passes that PSIM and the classifier answer; then be ready."""
        await self._screened(Entry("", ""), ["warm up"])
        await self._victim.start()
        self._warm = True
        self._metrics.ready.set(1)

    async def close(self) -> None:
        """Let go of the victim, if it was started."""
        if self._warm:
            await self._victim.close()

    @property
    def candidate(self) -> str | None:
        """Digest of the bundle that is tried, if there is one."""
        return self._candidate.digest if self._candidate else None

    @property
    def speaks(self) -> str | None:
        """The dialect of the upstream; None if there is none, or while it is not known."""
        return self._victim.speaks

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return what the upstream says of itself at a path of Open Inference, if it speaks that.

        Raises:
            UpstreamFailed, TimedOut: it says nothing that can be used.
        """
        return await self._victim.metadata(path)

    @property
    def health(self) -> Health:
        """How the inference worker is."""
        return self._screener.health

    @property
    def trouble(self) -> str | None:
        """Why requests are not served; None if they are."""
        trouble = None
        if self.health is not Health.RUNNING:
            trouble = f"the inference worker {self.health}"
        elif not self._warm:
            trouble = "the gateway is starting"
        elif not self._victim.ready:
            trouble = "the upstream is down"
        self._metrics.ready.set(trouble is None)
        return trouble

    async def _screened(
        self, entry: Entry, texts: Sequence[str], by: Screener | None = None
    ) -> list[Screened]:
        entry.guard = self._guard
        await entry.caller.take(len(texts))
        with entry.span("screen"):
            answers = await (by or self._screener).screen(texts)
        entry.time([answer.stages for answer in answers])
        screened = [answer.value for answer in answers]
        entry.texts, entry.verdicts = texts, [s.verdict for s in screened]
        if self._candidate and self._warm:
            whole = (by or self._screener) is self._whole_texts
            self._candidate.compare(entry, whole)
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
                        found = await self._explainer.clean(text, one.verdict)
                        if found and not self._is_suspicious(found.screened.verdict):
                            cleaned[number] = found
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["sanitize"].observe(seconds)
        entry.time([{"sanitize": seconds}])
        return cleaned

    def _is_suspicious(self, verdict: Verdict | None) -> bool:
        return decide(verdict, Mode.ENFORCE, self._whole) is not Decision.ALLOW

    def _count_unscreened(self, passed: Sequence[Screened]) -> None:
        unscreened = sum(one.verdict is None for one in passed)
        if unscreened:
            self._metrics.fail_open.inc(unscreened)
            log.warning("fail open: inputs passed unscreened", extra={"inputs": unscreened})


def _result(
    screened: Screened,
    decision: Decision,
    removed: list[Removed] | None,
    scores: Sequence[Score],
    caller: Caller,
) -> Result:
    return Result(
        decision=decision,
        screen=None if screened.verdict is None else _wire(screened.verdict, caller),
        label=scores[0].label if scores else None,
        scores=list(scores) or None,
        removed=removed,
    )


def _removed(text: str, cleaned: Cleaned | None) -> list[Removed] | None:
    return None if cleaned is None else _parts(text, cleaned.removed)


def _parts(text: str, spans: Sequence[Span]) -> list[Removed]:
    return [Removed(start=start, end=end, text=text[start:end]) for start, end in spans]


def _wire(verdict: Verdict, caller: Caller) -> ScreenResult:
    if not caller.sees_scores:
        return ScreenResult(poisoned=verdict.poisoned, truncated=verdict.truncated)
    return ScreenResult.model_validate(verdict, from_attributes=True)
