"""Every request is recorded exactly once, however it ends: metrics and one line of log."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect

from models.screen import Verdict
from service.errors import (
    Invalid,
    Malformed,
    NotInspected,
    Overloaded,
    TooLarge,
    UnknownModel,
    UnsupportedMedia,
    UpstreamRefused,
)
from service.metrics import Metrics
from service.schemas import Decision
from service.settings import Mode

log = logging.getLogger("psim.request")


@dataclass
class Entry:
    """What is known of a request while it runs."""

    route: str
    request_id: str
    verdicts: Sequence[Verdict] = ()
    decisions: Sequence[Decision] = ()
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""

    def time(self, inputs: Sequence[Mapping[str, float]]) -> None:
        """Add the seconds that inputs took side by side, by stage: the slowest counts."""
        for stage in {stage for stages in inputs for stage in stages}:
            slowest = max(stages.get(stage, 0.0) for stages in inputs)
            self.stages[stage] = self.stages.get(stage, 0.0) + slowest


class Recorder:
    """Writes metrics and log."""

    def __init__(self, metrics: Metrics, mode: Mode) -> None:
        self._metrics, self._mode = metrics, mode

    @contextmanager
    def record(self, route: str, request_id: str) -> Iterator[Entry]:
        """Record the request that runs inside; exceptions pass through."""
        entry, started, outcome = Entry(route, request_id), time.perf_counter(), "error"
        try:
            yield entry
            outcome = "rejected" if all_rejected(entry.decisions) else "ok"
        except BaseException as error:
            outcome = _outcome_of(error)
            raise
        finally:
            self._write(entry, outcome, time.perf_counter() - started)

    def _write(self, entry: Entry, outcome: str, seconds: float) -> None:
        metrics = self._metrics
        metrics.requests.labels(entry.route, outcome).inc()
        metrics.request_seconds.labels(entry.route).observe(seconds)
        for verdict in entry.verdicts:
            metrics.confidence.observe(verdict.confidence)
            metrics.score.observe(verdict.score)
        if outcome in ("ok", "rejected"):
            for decision in entry.decisions:
                metrics.inputs.labels(decision, self._mode).inc()
            if self._mode is Mode.SHADOW and entry.decisions:
                metrics.would_reject.inc(sum(v.poisoned for v in entry.verdicts))
        log.info(
            "request",
            extra={
                "request_id": entry.request_id,
                "route": entry.route,
                "outcome": outcome,
                "seconds": round(seconds, 6),
                "stages": {stage: round(s, 6) for stage, s in entry.stages.items()},
                "decisions": dict(Counter(entry.decisions)),
                "poisoned": sum(v.poisoned for v in entry.verdicts),
            },
        )


def all_rejected(decisions: Sequence[Decision]) -> bool:
    """Return whether there are inputs and not one of them was let through."""
    return bool(decisions) and all(d is Decision.REJECT for d in decisions)


def _outcome_of(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError() | ClientDisconnect():
            return "cancelled"
        case Overloaded():
            return "overloaded"
        case (
            Malformed()
            | Invalid()
            | NotInspected()
            | TooLarge()
            | UnknownModel()
            | UnsupportedMedia()
            | UpstreamRefused()
        ):
            return "client_error"
    return "error"
