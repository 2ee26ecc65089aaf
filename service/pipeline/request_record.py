"""Records of requests: each is written once, however it ends, to metrics, span, log and audit."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, SpanKind, StatusCode, Tracer
from starlette.requests import ClientDisconnect

from models.detection.screen import Finding, Verdict
from service.audit.rows import EXCEPTION, NAMES, Row
from service.errors import NotInspected, ServiceError
from service.observability.drift import Drift
from service.observability.metrics import ModelMetrics, RequestMetrics
from service.observability.traces import exemplar, trace_id
from service.pipeline.policy import all_rejected
from service.schemas import Decision
from service.settings import Mode

if TYPE_CHECKING:  # importing it takes memory, and many services have no audit
    from service.audit.writer import Writer

log = logging.getLogger("psim.request")

READINGS = {"poisoned", *(f.name for f in fields(Verdict))} & {*NAMES}
"""What the audit keeps of a verdict."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The model that a request is for."""

    model: str
    digest: str
    """SHA-256 of the bundle's manifest."""
    mode: Mode
    """That of the caller's key, if it has one of its own."""
    metrics: ModelMetrics
    drift: Drift


@dataclass
class RequestRecord:
    """What is known about a request; it is filled in while the request runs."""

    route: str
    request_id: str
    caller: str | None
    """Name of the API key; None without one."""
    tracer: Tracer
    context: ModelContext | None = None
    """None until the model is known."""
    texts: Sequence[str] = ()
    numbers: Sequence[int] = ()
    """Places of the texts in the request; empty if they are all that it has."""
    verdicts: Sequence[Verdict | None] = ()
    """One per text; None if screening failed."""
    decisions: Sequence[Decision | None] = ()
    """One per text; None if the rejection of another text left it without an answer."""
    excepted: Sequence[bool] = ()
    """For each text, whether a reviewed exception decided on it; empty if no decision was made."""
    would_reject: int = 0
    """Texts that mode `enforce` would have rejected."""
    labels: Sequence[str | None] = ()
    """The classifier's label of each text; None if it was not classified."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""

    @property
    def known_verdicts(self) -> list[Verdict]:
        """The verdicts of texts whose screening did not fail."""
        return [verdict for verdict in self.verdicts if verdict is not None]

    @property
    def findings(self) -> Counter[Finding]:
        """How many texts have each finding."""
        return Counter(v.finding for v in self.known_verdicts if v.finding)

    def span(self, name: str) -> AbstractContextManager[Span]:
        """Trace a stage of the request, without the messages of exceptions."""
        return _span(self.tracer, name, SpanKind.INTERNAL)

    def add_seconds(self, inputs: Sequence[Mapping[str, float]]) -> None:
        """Add the seconds that inputs took in parallel, by stage: the slowest input counts."""
        for stage in {stage for stages in inputs for stage in stages}:
            slowest = max(stages.get(stage, 0.0) for stages in inputs)
            self.stages[stage] = self.stages.get(stage, 0.0) + slowest


class Recorder:
    """Writes records to metrics, span, log, and the audit if there is one."""

    def __init__(self, metrics: RequestMetrics, tracer: Tracer, audit: "Writer | None") -> None:
        self._metrics, self._tracer, self._audit = metrics, tracer, audit

    @contextmanager
    def record(self, route: str, request_id: str, caller: str | None) -> Iterator[RequestRecord]:
        """Record the request that the block runs; exceptions pass through."""
        record = RequestRecord(route, request_id, caller, self._tracer)
        started, outcome = time.perf_counter(), "error"
        with _span(self._tracer, f"POST {route}", SpanKind.SERVER) as span:
            try:
                yield record
                outcome = "rejected" if all_rejected(record.decisions) else "ok"
            except BaseException as error:
                outcome = _outcome_of(error)
                if isinstance(error, NotInspected):
                    self._metrics.not_inspected.labels(route).inc()
                raise
            finally:
                self._write(record, outcome, time.perf_counter() - started)
                _describe(span, record, outcome)

    def _write(self, record: RequestRecord, outcome: str, seconds: float) -> None:
        metrics, exemplar_labels = self._metrics, exemplar(record.request_id)
        metrics.requests.labels(record.route, outcome).inc(exemplar=exemplar_labels)
        metrics.request_seconds.labels(record.route).observe(seconds, exemplar_labels)
        if context := record.context:
            self._count_inputs(context, record, outcome in ("ok", "rejected"))
        log.info(
            "request",
            extra={
                "request_id": record.request_id,
                "trace_id": trace_id(),
                "route": record.route,
                "model": record.context and record.context.model,
                "caller": record.caller,
                "outcome": outcome,
                "seconds": round(seconds, 6),
                "stages": {stage: round(s, 6) for stage, s in record.stages.items()},
                "decisions": dict(Counter(filter(None, record.decisions))),
                "findings": dict(record.findings),
            },
        )

    def _count_inputs(self, context: ModelContext, record: RequestRecord, answered: bool) -> None:
        metrics, exemplar_labels = context.metrics, exemplar(record.request_id)
        for verdict in record.known_verdicts:
            metrics.confidence.observe(verdict.confidence, exemplar_labels)
            metrics.score.observe(verdict.score, exemplar_labels)
            if verdict.override is not None:
                metrics.override.observe(verdict.override, exemplar_labels)
            if verdict.truncated:
                metrics.truncated_inputs.inc(exemplar=exemplar_labels)
            if verdict.finding:
                metrics.findings[verdict.finding].inc(exemplar=exemplar_labels)
        context.drift.add(record.known_verdicts)
        if not answered:
            return
        for decision in filter(None, record.decisions):
            metrics.inputs(context.mode, decision).inc(exemplar=exemplar_labels)
        metrics.excepted_inputs.inc(sum(_by_exception(record)))
        if context.mode is Mode.SHADOW:
            metrics.would_reject.inc(record.would_reject)
        if self._audit is not None:
            self._audit.add(_rows(context, record))


def _rows(context: ModelContext, record: RequestRecord) -> list[Row]:
    now, nothing = datetime.now(UTC), [None] * len(record.texts)
    inputs = zip(
        record.numbers or range(len(record.texts)),
        record.texts,
        record.verdicts,
        record.decisions or nothing,
        record.labels or nothing,
        _by_exception(record),
        strict=True,
    )
    return [
        Row(
            time=now,
            request_id=record.request_id,
            number=number,
            route=record.route,
            decision=decision,
            mode=context.mode,
            label=label,
            digest=context.digest,
            text=text,
            model=context.model,
            caller=record.caller,
            reason=EXCEPTION if by_exception else None,
            **_readings(verdict),
        )
        for number, text, verdict, decision, label, by_exception in inputs
    ]


def _by_exception(record: RequestRecord) -> list[bool]:
    """Return for each text whether an exception let it pass; not if it got no answer."""
    if not record.excepted:
        return [False] * len(record.texts)
    passed = (decision is Decision.ALLOW for decision in record.decisions)
    return [*map(all, zip(record.excepted, passed, strict=True))]


def _readings(verdict: Verdict | None) -> dict[str, Any]:
    """Return what is kept of a verdict, by column; all None if screening failed."""
    return {name: getattr(verdict, name, None) for name in READINGS}


def _span(tracer: Tracer, name: str, kind: SpanKind) -> AbstractContextManager[Span]:
    if isinstance(tracer, NoOpTracer):
        return nullcontext(INVALID_SPAN)
    # The message of an exception may quote a text.
    return tracer.start_as_current_span(
        name, kind=kind, record_exception=False, set_status_on_exception=False
    )


def _describe(span: Span, record: RequestRecord, outcome: str) -> None:
    span.set_attributes(
        {
            "http.request.method": "POST",
            "http.route": record.route,
            "psim.request_id": record.request_id,
            "psim.model": record.context.model if record.context else "",
            "psim.outcome": outcome,
            "psim.inputs": len(record.verdicts),
            **{f"psim.{finding}": record.findings[finding] for finding in Finding},
        }
    )
    if outcome == "error":
        span.set_status(StatusCode.ERROR)


def _outcome_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | ClientDisconnect):
        return "cancelled"
    return error.outcome if isinstance(error, ServiceError) else "error"
