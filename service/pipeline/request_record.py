"""Every request is recorded exactly once, however it ends: metrics, span, line of log, audit."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer
from starlette.requests import ClientDisconnect

from models.detection.screen import Verdict
from service.audit.rows import NAMES, Row
from service.audit.writer import Writer
from service.errors import (
    Forbidden,
    Invalid,
    Malformed,
    NotInspected,
    Overloaded,
    RateLimited,
    TooLarge,
    UnknownModel,
    UnsupportedMedia,
    UpstreamRefused,
)
from service.observability.drift import Drift
from service.observability.metrics import ModelMetrics, RequestMetrics
from service.observability.traces import exemplar, trace_id
from service.schemas import Decision
from service.security.access import ANYONE, Caller
from service.settings import Mode

log = logging.getLogger("psim.request")

READINGS = {f.name for f in fields(Verdict)} & {*NAMES}
"""What the audit keeps of a verdict."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """Who screens a request."""

    model: str
    digest: str
    """Of the bundle."""
    mode: Mode
    metrics: ModelMetrics
    drift: Drift


@dataclass
class RequestRecord:
    """What is known of a request while it runs."""

    route: str
    request_id: str
    caller: Caller = ANYONE
    guard: ModelContext | None = None
    """None until it is known which model the request is for."""
    texts: Sequence[str] = ()
    verdicts: Sequence[Verdict | None] = ()
    """By text; None if screening failed."""
    decisions: Sequence[Decision | None] = ()
    """By text; None if it got no answer, because of another one that was rejected."""
    labels: Sequence[str | None] = ()
    """What the classifier said of each text; None if it was not asked."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    tracer: Tracer = field(default_factory=NoOpTracer)

    @property
    def judged(self) -> list[Verdict]:
        """The verdicts that there are."""
        return [verdict for verdict in self.verdicts if verdict is not None]

    def span(self, name: str) -> AbstractContextManager[Span]:
        """Trace the part of the request that runs inside; of an exception only that it was."""
        return _span(self.tracer, name, SpanKind.INTERNAL)

    def time(self, inputs: Sequence[Mapping[str, float]]) -> None:
        """Add the seconds that inputs took side by side, by stage: the slowest counts."""
        for stage in {stage for stages in inputs for stage in stages}:
            slowest = max(stages.get(stage, 0.0) for stages in inputs)
            self.stages[stage] = self.stages.get(stage, 0.0) + slowest


class Recorder:
    """Writes metrics, span, log, and the audit if there is one."""

    def __init__(self, metrics: RequestMetrics, tracer: Tracer, audit: Writer | None) -> None:
        self._metrics, self._tracer, self._audit = metrics, tracer, audit

    @contextmanager
    def record(
        self, route: str, request_id: str, caller: Caller = ANYONE
    ) -> Iterator[RequestRecord]:
        """Record the request that runs inside; exceptions pass through."""
        entry = RequestRecord(route, request_id, caller, tracer=self._tracer)
        started, outcome = time.perf_counter(), "error"
        with _span(self._tracer, f"POST {route}", SpanKind.SERVER) as span:
            try:
                yield entry
                outcome = "rejected" if all_rejected(entry.decisions) else "ok"
            except BaseException as error:
                outcome = _outcome_of(error)
                raise
            finally:
                self._write(entry, outcome, time.perf_counter() - started)
                _describe(span, entry, outcome)

    def _write(self, entry: RequestRecord, outcome: str, seconds: float) -> None:
        metrics, found_by = self._metrics, exemplar(entry.request_id)
        metrics.requests.labels(entry.route, outcome).inc(exemplar=found_by)
        metrics.request_seconds.labels(entry.route).observe(seconds, found_by)
        if guard := entry.guard:
            self._count_inputs(guard, entry, outcome in ("ok", "rejected"))
        log.info(
            "request",
            extra={
                "request_id": entry.request_id,
                "trace_id": trace_id(),
                "route": entry.route,
                "model": entry.guard and entry.guard.model,
                "caller": entry.caller.name,
                "outcome": outcome,
                "seconds": round(seconds, 6),
                "stages": {stage: round(s, 6) for stage, s in entry.stages.items()},
                "decisions": dict(Counter(filter(None, entry.decisions))),
                "poisoned": sum(v.poisoned for v in entry.judged),
            },
        )

    def _count_inputs(self, guard: ModelContext, entry: RequestRecord, answered: bool) -> None:
        metrics, found_by = guard.metrics, exemplar(entry.request_id)
        for verdict in entry.judged:
            metrics.confidence.observe(verdict.confidence, found_by)
            metrics.score.observe(verdict.score, found_by)
        guard.drift.add(entry.judged)
        if not answered:
            return
        for decision in filter(None, entry.decisions):
            metrics.inputs[decision].inc(exemplar=found_by)
        if guard.mode is Mode.SHADOW and entry.decisions:
            metrics.would_reject.inc(sum(v.poisoned for v in entry.judged))
        if self._audit is not None:
            self._audit.add(_rows(guard, entry))


def all_rejected(decisions: Sequence[Decision | None]) -> bool:
    """Return whether there are inputs and not one of them was let through."""
    return bool(decisions) and {*decisions} <= {Decision.REJECT, None}


def _rows(guard: ModelContext, entry: RequestRecord) -> list[Row]:
    now, nothing = datetime.now(UTC), [None] * len(entry.texts)
    inputs = zip(
        entry.texts,
        entry.verdicts,
        entry.decisions or nothing,
        entry.labels or nothing,
        strict=True,
    )
    return [
        Row(
            time=now,
            request_id=entry.request_id,
            number=number,
            route=entry.route,
            decision=decision,
            mode=guard.mode,
            label=label,
            digest=guard.digest,
            text=text,
            model=guard.model,
            caller=entry.caller.name,
            **_readings(verdict),
        )
        for number, (text, verdict, decision, label) in enumerate(inputs)
    ]


def _readings(verdict: Verdict | None) -> dict[str, Any]:
    """Return what a verdict says by name; all None if screening failed."""
    return {name: getattr(verdict, name, None) for name in READINGS}


def _span(tracer: Tracer, name: str, kind: SpanKind) -> AbstractContextManager[Span]:
    # The message of an exception may quote the text.
    return tracer.start_as_current_span(
        name, kind=kind, record_exception=False, set_status_on_exception=False
    )


def _describe(span: Span, entry: RequestRecord, outcome: str) -> None:
    span.set_attributes(
        {
            "http.request.method": "POST",
            "http.route": entry.route,
            "psim.request_id": entry.request_id,
            "psim.model": entry.guard.model if entry.guard else "",
            "psim.outcome": outcome,
            "psim.inputs": len(entry.verdicts),
            "psim.poisoned": sum(v.poisoned for v in entry.judged),
        }
    )
    if outcome == "error":
        span.set_status(StatusCode.ERROR)


def _outcome_of(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError() | ClientDisconnect():
            return "cancelled"
        case Overloaded():
            return "overloaded"
        case (
            Malformed()
            | Invalid()
            | Forbidden()
            | NotInspected()
            | RateLimited()
            | TooLarge()
            | UnknownModel()
            | UnsupportedMedia()
            | UpstreamRefused()
        ):
            return "client_error"
    return "error"
