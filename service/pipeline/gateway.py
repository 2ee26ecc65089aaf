"""The path of a request: screen, decide, sanitize if asked to, classify, answer. Read this first.

Fail-closed by shape: an exception while screening leaves `handle` before the classifier is called.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.bundle.load import Bundle
from models.detection.passage import Span
from models.detection.screen import Verdict
from models.detection.views import FIRES
from service.audit.rows import EXCEPTION
from service.classifiers.base import Call, Classifier, ClassifierInput, Reply
from service.errors import NotInspected, NotReady, Overloaded, RateLimited, ScreenFailed, TooLarge
from service.inference.batcher import Screened, Screener, free
from service.inference.worker import Health
from service.observability.drift import Drift
from service.observability.metrics import ModelMetrics
from service.pipeline.challenger import Challenger
from service.pipeline.policy import (
    Decider,
    Policy,
    only_rejections,
    policy_of,
    refuses_request,
)
from service.pipeline.request_record import ModelContext, RequestRecord
from service.pipeline.seen import SeenTexts
from service.pipeline.trigger_search import Cleaned, TriggerSearch
from service.pipeline.upstream_parity import ParityCheck, UpstreamParity, publish
from service.pipeline.windows import WindowedScreener
from service.protocols.base import InferenceRequest, ModelInfo
from service.protocols.guardrails.litellm import GuardrailRequest
from service.protocols.openai import Moderation, moderation
from service.schemas import (
    Decision,
    ExplainRequest,
    ExplainResponse,
    Removed,
    Result,
    Score,
    ScreenResult,
    TextsRequest,
    WeightedWord,
)
from service.security.access import Caller
from service.settings import GatewaySettings, Mode

if TYPE_CHECKING:  # importing it takes memory, and many services have no audit
    from service.audit.exceptions_reader import Exceptions

log = logging.getLogger(__name__)

CONVERSATION_PART = 64
"""Texts of a conversation that are screened at once; a part that is done counts when all else
fails."""


NOT_CLEANED = (TimeoutError, Overloaded, ScreenFailed, RateLimited, TooLarge)
"""What leaves a text with its trigger, so that it stays rejected."""


@dataclass(frozen=True, slots=True)
class GatewayResult:
    """The outcome of a request for classes."""

    results: Sequence[Result]
    """One per input; without scores if there is a reply."""
    refused: bool
    """True if a rejection leaves the whole request without an answer."""
    reply: Reply | None = None
    """The upstream's answer, already in the caller's protocol."""

    @property
    def rejected(self) -> list[int]:
        """Numbers of the rejected inputs, from 0."""
        return [i for i, one in enumerate(self.results) if one.decision is Decision.REJECT]

    @property
    def excepted(self) -> list[int]:
        """Numbers of the inputs that a reviewed exception lets pass, from 0."""
        return [i for i, one in enumerate(self.results) if one.reason]


@dataclass(frozen=True, slots=True)
class ConversationResult:
    """The outcome of a question about a conversation."""

    rejected: bool
    cleaned: Mapping[str, str]
    """What takes the place of each sanitized text; empty if the conversation is rejected."""


@dataclass(slots=True)
class JudgedText:
    """A text on its way through the gateway."""

    text: str
    screened: Screened
    decision: Decision
    cleaned: Cleaned | None = None
    """Replaces the text at the classifier, if it was sanitized."""
    excepted: bool = False
    """Whether a reviewed exception lets it pass."""
    scores: Sequence[Score] = ()
    """As many as were asked for, best first."""
    labels: list[str] | None = None
    """Those that fire, of a multi-label classifier."""

    @property
    def for_classifier(self) -> ClassifierInput:
        """What the classifier gets to read."""
        if self.cleaned:
            return ClassifierInput(self.cleaned.text, self.cleaned.screened)
        return ClassifierInput(self.text, self.screened)

    def result(self, caller: Caller) -> Result:
        """Return what the caller is told."""
        verdict = self.screened.verdict
        return Result(
            decision=self.decision,
            screen=None if verdict is None else _screen_result(verdict, caller),
            label=self.scores[0].label if self.scores else None,
            labels=self.labels,
            scores=list(self.scores) or None,
            reason=EXCEPTION if self.excepted else None,
            removed=_removed(self.text, self.cleaned.removed) if self.cleaned else None,
        )


class Gateway:
    """Screens every input before the classifier sees it.

    `handle`, `screen`, `judge` and `explain` answer requests. They charge each pass to the caller
    before it is run, and fill in the record.
    """

    def __init__(
        self,
        bundle: Bundle,
        model_info: ModelInfo,
        screener: Screener,
        windowed_screener: Screener,
        classifier: Classifier,
        trigger_search: TriggerSearch,
        metrics: ModelMetrics,
        settings: GatewaySettings,
        challenger: Challenger | None = None,
        parity: ParityCheck | None = None,
        exceptions: "Exceptions | None" = None,
    ) -> None:
        self.bundle, self.model_info, self.mode = bundle, model_info, settings.mode
        self.drift = Drift(bundle)
        self.elsewhere = settings.upstream is not None
        self._screener, self._windowed_screener = screener, windowed_screener
        self._classifier, self._trigger_search = classifier, trigger_search
        self._metrics, self._settings, self._challenger = metrics, settings, challenger
        self._parity, self._exceptions = parity, exceptions
        self._seen = SeenTexts(settings.seen_texts)
        self._warm = False

    def policy_of(self, caller: Caller, *, elsewhere: bool = False) -> Policy:
        """Return the policy for a caller's texts.

        Args:
            caller: whose key may have a policy of its own.
            elsewhere: whether the texts go to a classifier elsewhere, whatever the settings say.
        """
        return policy_of(self._settings, elsewhere or self.elsewhere, caller.key)

    def context_of(self, caller: Caller) -> ModelContext:
        """Return the model as a request of a caller meets it.

        Raises:
            Forbidden: the caller's key is not for the model.
        """
        model = self.model_info.model
        caller.require_model(model, self.bundle.manifest.frr_budget)
        mode = self.policy_of(caller).mode
        return ModelContext(model, self.bundle.digest, mode, self._metrics, self.drift)

    async def handle(self, record: RequestRecord, caller: Caller, call: Call) -> GatewayResult:
        """Screen the texts, classify those that may pass, and answer in their order.

        Raises:
            ServiceError: nothing of the request is answered.
        """
        record.numbers, texts = [*call.readable], [*call.readable.values()]
        screened = await self._screen(record, caller, texts, self._screener)
        decider = self._decider(caller)
        decided = _decide(record, decider)
        inputs = [
            JudgedText(text, one, decision, excepted=excepted)
            for text, one, decision, excepted in zip(
                texts, screened, decided, record.excepted, strict=True
            )
        ]
        if decider.policy.mode is Mode.SANITIZE:
            await self._sanitize(record, caller, inputs, decider.policy)
        decisions = [one.decision for one in inputs]
        if refuses_request(decisions, call.protocol.supports_partial):
            # The others get no answer either, so they do not count as allowed.
            record.decisions = only_rejections(decisions)
            results = [one.result(caller) for one in inputs]
            return GatewayResult(_with_gaps(results, call), refused=True)
        reply = await self._classify(record, call, inputs)
        record.decisions = decisions
        results = [one.result(caller) for one in inputs]
        record.labels = [_recorded(result) for result in results]
        return GatewayResult(_with_gaps(results, call), refused=False, reply=reply)

    async def screen(
        self, record: RequestRecord, caller: Caller, request: TextsRequest
    ) -> list[ScreenResult]:
        """Screen the texts and stop there.

        Raises:
            TooLarge, RateLimited: as `Caller.take` does.
            Overloaded, NotReady, ScreenFailed: nothing of the request is answered.
        """
        screened = await self._screen(record, caller, request.texts, self._screener)
        verdicts = [one.verdict for one in screened if one.verdict is not None]
        if len(verdicts) < len(screened):
            raise ScreenFailed("an input could not be screened")
        return [_screen_result(verdict, caller) for verdict in verdicts]

    async def judge(
        self, record: RequestRecord, caller: Caller, request: TextsRequest
    ) -> list[Decision]:
        """Decide on texts that a proxy forwards to a classifier, which may read them to their end.

        Raises:
            NotInspected: it may read two texts as one.
            TooLarge, RateLimited: as `Caller.take` does.
            Overloaded, NotReady, ScreenFailed: no text may pass.
        """
        if isinstance(request, InferenceRequest) and request.may_be_pair:
            raise NotInspected("a list of two texts may be read as a pair; send each by itself")
        screened = await self._screen(record, caller, request.texts, self._windowed_screener)
        decider = self._decider(caller, elsewhere=True)
        record.decisions = decisions = _decide(record, decider)
        self._count_unscreened(screened)
        return decisions

    async def judge_conversation(
        self, record: RequestRecord, caller: Caller, conversation: GuardrailRequest
    ) -> ConversationResult:
        """Decide on the texts of a conversation, most of which were there a turn ago.

        They are screened part by part. A text that was screened before is not screened or recorded
        again, unless it is rejected. A rejection ends the work, since it denies the request.

        Raises:
            ServiceError: as `judge` does; what was screened until then is remembered.
        """
        decider = self._decider(caller, elsewhere=True)
        rejected = await self._screen_conversation(record, caller, conversation, decider)
        record.decisions = _decide(record, decider)
        return ConversationResult(rejected, {})

    async def sanitize_conversation(
        self, record: RequestRecord, caller: Caller, conversation: GuardrailRequest
    ) -> ConversationResult:
        """Decide as `judge_conversation` does; in mode `sanitize`, replace triggered texts.

        The conversation is screened again with what replaces them, so a trigger that is anywhere
        else, or in several texts together, still rejects it.

        Raises:
            ServiceError: as `judge` does.
        """
        decider = self._decider(caller, elsewhere=True)
        if decider.policy.mode is not Mode.SANITIZE:
            return await self.judge_conversation(record, caller, conversation)
        cleaned: dict[str, str] = {}
        rejected = await self._screen_conversation(record, caller, conversation, decider)
        with self._sanitizing(record), suppress(*NOT_CLEANED):
            async with asyncio.timeout(self._settings.sanitize_s):
                while rejected:
                    texts = conversation.replaceable - cleaned.keys()
                    found = await self._clean_texts(record, caller, texts, decider)
                    if not found:
                        break
                    cleaned |= found
                    changed = conversation.replacing(cleaned)
                    rejected = await self._screen_conversation(record, caller, changed, decider)
        decisions = _decide(record, decider)
        if not rejected:
            # They passed without their triggers, and so did what they are a part of.
            decisions = [Decision.SANITIZE if d is Decision.REJECT else d for d in decisions]
        record.decisions = decisions
        return ConversationResult(rejected, {} if rejected else cleaned)

    async def moderate(
        self, record: RequestRecord, caller: Caller, request: TextsRequest
    ) -> list[Moderation]:
        """Judge the texts for a hook, which decides by itself what to do with those flagged.

        Raises:
            ServiceError: as `judge` does.
        """
        await self.judge(record, caller, request)
        policy = self.policy_of(caller, elsewhere=True)
        return [
            moderation(verdict, policy.flags(verdict) and not excepted, caller.sees_scores)
            for verdict, excepted in zip(record.verdicts, record.excepted, strict=True)
        ]

    async def explain(
        self, record: RequestRecord, caller: Caller, request: ExplainRequest
    ) -> ExplainResponse:
        """Return the words of a text that its verdict rests on.

        Raises:
            Forbidden: answers to the caller hold decisions only.
            TooLarge, RateLimited: as `Caller.take` does.
            Overloaded, NotReady, ScreenFailed: as `TriggerSearch.explain` does.
        """
        caller.require_scores()
        text = request.inputs
        verdict, found = await self._trigger_search.explain(text, caller.take)
        record.texts, record.verdicts = [text], [verdict]
        words = [
            WeightedWord(start=w.start, end=w.end, text=text[w.start : w.end], weight=w.weight)
            for w in found.words
        ]
        return ExplainResponse(
            bundle=self.bundle.digest,
            screen=_screen_result(verdict, caller),
            words=words,
            removed=_removed(text, found.removed),
            known_triggers=[
                known.text for known in self.bundle.manifest.known_triggers if known.is_in(text)
            ],
        )

    async def start(self) -> None:
        """Prove with real forward passes that PSIM and the classifier answer; then be ready.

        Raises:
            ServiceError: one of them does not.
        """
        (answer,) = await self._screener.screen(["warm up"], free)
        if answer.value.verdict is None:  # even if the gateway is to fail open
            raise ScreenFailed("the screen gives no verdict on the text that it is tried with")
        await self._classifier.start()
        if self._parity:
            await self._parity.start()
        self._warm = True
        self.update_gauges()

    async def close(self) -> None:
        """Release the classifier, even if it was not started, or not wholly."""
        if self._parity:
            await self._parity.close()
        await self._classifier.close()

    @property
    def challenger(self) -> str | None:
        """Digest of the challenger's bundle, if there is one."""
        return self._challenger.digest if self._challenger else None

    @property
    def override_test(self) -> str | None:
        """Which texts go through the override test, `suspicious` or `thorough`; None if none do."""
        return self._screener.override_test

    @property
    def upstream_protocol(self) -> str | None:
        """The protocol of the upstream; None if there is none, or while it is not known."""
        return self._classifier.upstream_protocol

    @property
    def upstream_parity(self) -> UpstreamParity | None:
        """Whether the upstream classifies as the bundle's model does; None without an upstream."""
        return self._parity.latest if self._parity else None

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return the upstream's metadata at a path of Open Inference; None if it has none.

        Raises:
            UpstreamFailed, TimedOut: there is no usable answer.
        """
        return await self._classifier.metadata(path)

    @property
    def health(self) -> Health:
        """State of the inference worker."""
        return self._screener.health

    @property
    def unready_reason(self) -> str | None:
        """Why requests are not served; None if they are."""
        if self.health is not Health.RUNNING:
            return f"the inference worker {self.health}"
        if not self._warm:
            return "the gateway is starting"
        if not self._classifier.ready:
            return "the upstream is down"
        return self._parity.unready_reason if self._parity else None

    def update_gauges(self) -> None:
        """Set the gauges that tell a state: `psim_ready`, and those of the upstream's parity."""
        self._metrics.ready.set(self.unready_reason is None)
        publish(self.upstream_parity, self._metrics)

    async def _screen(
        self, record: RequestRecord, caller: Caller, texts: Sequence[str], screener: Screener
    ) -> list[Screened]:
        with record.span("screen"):
            answers = await screener.screen(texts, caller.take)
        record.add_seconds([answer.stages for answer in answers])
        screened = [answer.value for answer in answers]
        verdicts = [one.verdict for one in screened]
        record.texts = [*record.texts, *texts]
        record.verdicts = [*record.verdicts, *verdicts]
        if self._challenger and self._warm:
            to_the_end = isinstance(screener, WindowedScreener)
            self._challenger.compare(record.request_id, texts, verdicts, to_the_end)
        self._require_verdicts(verdicts)
        return screened

    async def _screen_conversation(
        self,
        record: RequestRecord,
        caller: Caller,
        conversation: GuardrailRequest,
        decider: Decider,
    ) -> bool:
        """Screen those texts that are not known; return whether one of all is rejected."""
        # Callers share nothing: how soon an answer comes would tell one what the others send. The
        # limit after which the classifier cuts a text changes how it is screened.
        context = f"{self._classifier.max_length} {caller.name or ''}"
        known = {text: self._seen.find(text, context) for text in conversation.texts}
        rejected = {text: v for text, v in known.items() if v and decider.rejects(text, v)}
        new = [text for text, verdict in known.items() if verdict is None]
        self._metrics.seen_texts.inc(len(known) - len(new) - len(rejected))
        record.texts = [*record.texts, *rejected]
        record.verdicts = [*record.verdicts, *rejected.values()]
        denied = bool(rejected)
        while new and not denied:
            part, new = new[:CONVERSATION_PART], new[CONVERSATION_PART:]
            screened = await self._screen(record, caller, part, self._windowed_screener)
            for text, one in zip(part, screened, strict=True):
                if one.verdict and one.settled:
                    self._seen.add(text, context, one.verdict)
            self._count_unscreened(screened)
            verdicts = [one.verdict for one in screened]
            denied = any(map(decider.rejects, part, verdicts))
        return denied

    async def _clean_texts(
        self, record: RequestRecord, caller: Caller, texts: Set[str], decider: Decider
    ) -> dict[str, str]:
        """Return what replaces each text that has a trigger which is found."""
        found: dict[str, str] = {}
        for text, verdict in zip(record.texts, record.verdicts, strict=True):
            wanted = text in texts and text not in found and decider.rejects(text, verdict)
            if wanted and verdict and verdict.poisoned:
                cleaned = await self._trigger_search.clean(text, verdict, caller.take)
                if cleaned:
                    found[text] = cleaned.text
        return found

    def _decider(self, caller: Caller, *, elsewhere: bool = False) -> Decider:
        policy = self.policy_of(caller, elsewhere=elsewhere)
        return Decider(policy, self.bundle.digest, self._exceptions)

    def _require_verdicts(self, verdicts: Sequence[Verdict | None]) -> None:
        if None in verdicts and not self._settings.fail_open:
            raise ScreenFailed("an input could not be screened, so none was classified")

    async def _sanitize(
        self,
        record: RequestRecord,
        caller: Caller,
        inputs: Sequence[JudgedText],
        policy: Policy,
    ) -> None:
        """Clean as many triggered texts as time and rate allow; the others stay rejected."""
        with self._sanitizing(record), suppress(TimeoutError):
            async with asyncio.timeout(self._settings.sanitize_s):
                for one in inputs:
                    verdict = one.screened.verdict
                    if verdict is None or not verdict.poisoned or one.excepted:
                        continue
                    with suppress(*NOT_CLEANED):
                        cleaned = await self._trigger_search.clean(one.text, verdict, caller.take)
                        if cleaned and policy.decide(cleaned.screened.verdict) is Decision.ALLOW:
                            one.cleaned, one.decision = cleaned, Decision.SANITIZE

    @contextmanager
    def _sanitizing(self, record: RequestRecord) -> Iterator[None]:
        """Trace and time the search for triggers."""
        started = time.perf_counter()
        with record.span("sanitize"):
            yield
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["sanitize"].observe(seconds)
        record.add_seconds([{"sanitize": seconds}])

    async def _classify(
        self, record: RequestRecord, call: Call, inputs: Sequence[JudgedText]
    ) -> Reply | None:
        """Give every text that may pass its scores, unless the upstream's reply has them."""
        passed = [one for one in inputs if one.decision is not Decision.REJECT]
        accepted = [one.for_classifier for one in passed]
        if self._parity and (reason := self._parity.unready_reason):
            raise NotReady(reason)
        with record.span("classify"):
            answer = await self._classifier.classify(call, accepted)
        record.add_seconds(answer.stages)
        self._count_unscreened([one.screened for one in accepted])
        if answer.reply is None:
            for one, scores in zip(passed, answer.scores, strict=True):
                one.scores = scores[: call.request.limit]
                if self.model_info.multi_label:
                    one.labels = [score.label for score in scores if score.score >= FIRES]
        return answer.reply

    def _count_unscreened(self, passed: Sequence[Screened]) -> None:
        unscreened = sum(one.verdict is None for one in passed)
        if unscreened:
            self._metrics.fail_open.inc(unscreened)
            log.warning("fail open: inputs passed unscreened", extra={"inputs": unscreened})


def _with_gaps(results: Sequence[Result], call: Call) -> list[Result]:
    """Return a result for each text of the request, given those of the texts that were read."""
    by_number = dict(zip(call.readable, results, strict=True))
    for number, error in call.unreadable.items():
        by_number[number] = Result(
            decision=Decision.REJECT, screen=None, label=None, scores=None, error=error
        )
    return [by_number[number] for number in sorted(by_number)]


def _recorded(result: Result) -> str | None:
    return result.label if result.labels is None else ", ".join(result.labels)


def _removed(text: str, spans: Sequence[Span]) -> list[Removed]:
    return [Removed(start=start, end=end, text=text[start:end]) for start, end in spans]


def _decide(record: RequestRecord, decider: Decider) -> list[Decision]:
    """Return a decision for each text; record what exceptions did, and what `enforce` would."""
    texts, verdicts = record.texts, record.verdicts
    record.excepted = [*map(decider.excepts, texts, verdicts)]
    record.would_reject = sum(map(decider.would_reject, texts, verdicts))
    return [*map(decider.decide, texts, verdicts)]


def _screen_result(verdict: Verdict, caller: Caller) -> ScreenResult:
    if not caller.sees_scores:
        return ScreenResult(
            finding=verdict.finding, poisoned=verdict.poisoned, truncated=verdict.truncated
        )
    return ScreenResult.model_validate(verdict, from_attributes=True)
