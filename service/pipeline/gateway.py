"""The way of a request: screen, decide, sanitize if asked to, classify. Read this first.

Fail-closed by shape: an exception while screening leaves `handle` before the classifier is called.
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
from service.classifiers.base import Call, Classifier, ClassifierInput, Reply
from service.errors import Overloaded, ScreenFailed
from service.inference.batcher import Screened, Screener
from service.inference.worker import Health
from service.observability.drift import Drift
from service.observability.metrics import ModelMetrics
from service.pipeline.challenger import Challenger
from service.pipeline.request_record import ModelContext, RequestRecord
from service.pipeline.trigger_search import Cleaned, TriggerSearch
from service.protocols.base import ModelInfo
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
from service.settings import GatewaySettings, Mode

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
class GatewayResult:
    """What became of a request."""

    results: Sequence[Result]
    """Of each input; without scores if there is a reply."""
    rejected: Sequence[int]
    """Numbers of the rejected inputs, from 0."""
    refused: bool
    """True if nothing of the request is answered, because of what was rejected."""
    reply: Reply | None = None
    """The upstream's answer, ready-made in the caller's protocol."""


class Gateway:
    """Screens every input before the classifier sees it."""

    def __init__(
        self,
        bundle: Bundle,
        served: ModelInfo,
        screener: Screener,
        windowed_screener: Screener,
        classifier: Classifier,
        trigger_search: TriggerSearch,
        metrics: ModelMetrics,
        settings: GatewaySettings,
        challenger: Challenger | None = None,
    ) -> None:
        self._windowed_screener = windowed_screener
        self.bundle, self.served, self.mode = bundle, served, settings.mode
        self.drift = Drift(bundle)
        self._guard = ModelContext(served.model, bundle.digest, settings.mode, metrics, self.drift)
        self._screener, self._classifier, self._trigger_search = (
            screener,
            classifier,
            trigger_search,
        )
        self._metrics, self._settings = metrics, settings
        self._challenger = challenger
        self.elsewhere = settings.upstream is not None
        self._whole = self.elsewhere and settings.overlong == "reject"
        self._warm = False

    async def handle(self, entry: RequestRecord, call: Call) -> GatewayResult:
        """Screen the texts, classify those that may pass, and answer in their order.

        Raises:
            ServiceError: nothing of the request is answered.
        """
        texts = call.request.texts
        screened = await self._screened(entry, texts)
        decisions = [decide(s.verdict, self.mode, self._whole) for s in screened]
        cleaned: dict[int, Cleaned] = {}
        if self.mode is Mode.SANITIZE:
            with entry.span("sanitize"):
                cleaned = await self._cleaned(entry, texts, screened)
            decisions = [Decision.SANITIZE if i in cleaned else d for i, d in enumerate(decisions)]
        rejected = [i for i, d in enumerate(decisions) if d is Decision.REJECT]
        if rejected and (len(rejected) == len(texts) or not call.protocol.supports_partial):
            # The others get no answer either, so they do not count as allowed.
            entry.decisions = [d if d is Decision.REJECT else None for d in decisions]
            results = [
                _result(one, decision, None, [], entry.caller)
                for one, decision in zip(screened, decisions, strict=True)
            ]
            return GatewayResult(results, rejected, refused=True)
        passed = [i for i in range(len(texts)) if i not in rejected]
        accepted = [
            ClassifierInput(cleaned[i].text, cleaned[i].screened)
            if i in cleaned
            else ClassifierInput(texts[i], screened[i])
            for i in passed
        ]
        with entry.span("classify"):
            answer = await self._classifier.classify(call, accepted)
        entry.time(answer.stages)
        self._count_unscreened([one.screened for one in accepted])
        entry.decisions = decisions
        scores = {} if answer.reply else dict(zip(passed, answer.scores, strict=True))
        results = [
            _result(
                screened[i],
                decision,
                _removed(texts[i], cleaned.get(i)),
                scores.get(i, [])[: call.request.limit],
                entry.caller,
            )
            for i, decision in enumerate(decisions)
        ]
        entry.labels = [result.label for result in results]
        return GatewayResult(results, rejected, refused=False, reply=answer.reply)

    async def screen(self, entry: RequestRecord, texts: Sequence[str]) -> list[ScreenResult]:
        """Screen the texts and stop there.

        Raises:
            Overloaded, NotReady, ScreenFailed: nothing of the request is answered.
        """
        screened = await self._screened(entry, texts)
        if any(s.verdict is None for s in screened):
            raise ScreenFailed("an input could not be screened")
        return [_wire(s.verdict, entry.caller) for s in screened if s.verdict is not None]

    async def judge(self, entry: RequestRecord, texts: Sequence[str]) -> list[Decision]:
        """Decide on texts that somebody else forwards, to a classifier that may read all of them.

        Raises:
            Overloaded, NotReady, ScreenFailed: no text may pass.
        """
        screened = await self._screened(entry, texts, self._windowed_screener)
        whole = self._settings.overlong == "reject"
        decisions = [decide(s.verdict, self.mode, whole) for s in screened]
        entry.decisions = decisions
        self._count_unscreened(screened)
        return decisions

    async def explain(self, entry: RequestRecord, text: str) -> ExplainResponse:
        """Say which words of a text the screen minds.

        Raises:
            Forbidden: the caller is not told scores, of which these would be the finest.
            TooLarge, RateLimited: as `Caller.take` does.
            Overloaded, NotReady, ScreenFailed: as `TriggerSearch.explain` does.
        """
        entry.guard = self._guard
        entry.caller.require_scores()
        await entry.caller.take(1)
        verdict, found = await self._trigger_search.explain(text)
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
        await self._screened(RequestRecord("", ""), ["warm up"])
        await self._classifier.start()
        self._warm = True
        self._metrics.ready.set(1)

    async def close(self) -> None:
        """Let go of the classifier, if it was started."""
        if self._warm:
            await self._classifier.close()

    @property
    def challenger(self) -> str | None:
        """Digest of the bundle that is tried, if there is one."""
        return self._challenger.digest if self._challenger else None

    @property
    def upstream_protocol(self) -> str | None:
        """The protocol of the upstream; None if there is none, or while it is not known."""
        return self._classifier.upstream_protocol

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return what the upstream says of itself at a path of Open Inference, if it speaks that.

        Raises:
            UpstreamFailed, TimedOut: it says nothing that can be used.
        """
        return await self._classifier.metadata(path)

    @property
    def health(self) -> Health:
        """How the inference worker is."""
        return self._screener.health

    @property
    def unready_reason(self) -> str | None:
        """Why requests are not served; None if they are."""
        unready_reason = None
        if self.health is not Health.RUNNING:
            unready_reason = f"the inference worker {self.health}"
        elif not self._warm:
            unready_reason = "the gateway is starting"
        elif not self._classifier.ready:
            unready_reason = "the upstream is down"
        self._metrics.ready.set(unready_reason is None)
        return unready_reason

    async def _screened(
        self, entry: RequestRecord, texts: Sequence[str], by: Screener | None = None
    ) -> list[Screened]:
        entry.guard = self._guard
        await entry.caller.take(len(texts))
        with entry.span("screen"):
            answers = await (by or self._screener).screen(texts)
        entry.time([answer.stages for answer in answers])
        screened = [answer.value for answer in answers]
        entry.texts, entry.verdicts = texts, [s.verdict for s in screened]
        if self._challenger and self._warm:
            whole = (by or self._screener) is self._windowed_screener
            self._challenger.compare(entry, whole)
        if None in entry.verdicts and not self._settings.fail_open:
            raise ScreenFailed("an input could not be screened, so none was classified")
        return screened

    async def _cleaned(
        self, entry: RequestRecord, texts: Sequence[str], screened: Sequence[Screened]
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
                        found = await self._trigger_search.clean(text, one.verdict)
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
