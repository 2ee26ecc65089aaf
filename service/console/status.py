"""What is served in this process, as the pages show it."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.observability.metrics import Metrics
from service.pipeline.gateway import Gateway
from service.settings import AuditSettings


@dataclass(frozen=True, slots=True)
class Threshold:
    """That of one predicted class, or of several that share it."""

    labels: Sequence[str]
    value: float
    texts: int
    """That it was calibrated with."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, as the metrics say it."""

    name: str
    value: float
    most: float | None = None
    """What the settings allow."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A model: its gateway and its bundle."""

    unready_reason: str | None
    """Why requests are not served; None if they are."""
    worker: str
    mode: str
    model: str
    elsewhere: bool
    """Whether the classifier is."""
    upstream: str | None
    """What it speaks then; None while that is not known."""
    engine: str
    digest: str
    budget: float
    thresholds: Sequence[Threshold]
    figures: Sequence[Figure]
    drift: Sequence[Figure]
    keeps_texts: bool


def state(gateway: Gateway, metrics: Metrics, settings: AuditSettings) -> ServiceStatus:
    """Return how things are now."""
    bundle, model = gateway.bundle, gateway.served.model
    labels = bundle.manifest.labels
    samples = [
        sample
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("model", model) == model
    ]

    def number(name: str) -> float:
        return sum(sample.value for sample in samples if sample.name == f"psim_{name}")

    return ServiceStatus(
        unready_reason=gateway.unready_reason,
        worker=gateway.health,
        mode=gateway.mode,
        model=model,
        elsewhere=gateway.elsewhere,
        upstream=gateway.upstream_protocol,
        engine=f"{bundle.engine.name}, {bundle.engine.dtype}",
        digest=bundle.digest,
        budget=bundle.manifest.calibrations[0].frr_budget,
        thresholds=[
            Threshold([labels[i] for i in group.classes], group.threshold, len(group.scores))
            for group in bundle.screen.groups
        ],
        figures=[
            Figure("Inputs in the queue", number("queue_inputs"), number("max_queue_inputs")),
            Figure(
                "Characters in the queue",
                number("queue_characters"),
                number("max_queue_characters"),
            ),
            Figure("Restarts of the worker", number("worker_restarts_total")),
            Figure("Inputs passed unscreened", number("fail_open_total")),
            Figure("Inputs the audit lacks", number("audit_dropped_total")),
            Figure("Failures of the audit store", number("audit_failures_total")),
        ],
        drift=[
            Figure(f"{what}, {', '.join(one.labels)}", value)
            for one in gateway.drift.measure()
            for what, value in (
                ("Statistic", one.statistic),
                ("p-value", one.p_value),
                ("Inputs", one.inputs),
            )
        ],
        keeps_texts=settings.audit_text,
    )
