"""What runs in this process, as the pages show it."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.gateway import Gateway
from service.metrics import Metrics
from service.settings import Settings

DRIFT = "psim_drift"


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
class State:
    """The process and its bundle."""

    trouble: str | None
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


def state(gateway: Gateway, metrics: Metrics, settings: Settings) -> State:
    """Return how things are now."""
    bundle = gateway.bundle
    labels = bundle.manifest.labels

    def number(name: str) -> float:
        return metrics.registry.get_sample_value(f"psim_{name}") or 0.0

    return State(
        trouble=gateway.trouble,
        worker=gateway.health,
        mode=settings.mode,
        model=gateway.served.model,
        elsewhere=settings.upstream is not None,
        upstream=gateway.speaks,
        engine=f"{bundle.engine.name}, {bundle.engine.dtype}",
        digest=bundle.digest,
        budget=bundle.manifest.calibrations[0].frr_budget,
        thresholds=[
            Threshold([labels[i] for i in group.classes], group.threshold, len(group.scores))
            for group in bundle.screen.groups
        ],
        figures=[
            Figure("Inputs in the queue", number("queue_inputs"), settings.queue_inputs),
            Figure("Characters in the queue", number("queue_characters"), settings.queue_chars),
            Figure("Restarts of the worker", number("worker_restarts_total")),
            Figure("Inputs passed unscreened", number("fail_open_total")),
            Figure("Inputs the audit lacks", number("audit_dropped_total")),
            Figure("Failures of the audit store", number("audit_failures_total")),
        ],
        drift=_drift(metrics),
        keeps_texts=settings.audit_text,
    )


def _drift(metrics: Metrics) -> list[Figure]:
    """Return whatever is measured of drift."""
    samples = [
        (sample.name, sample.labels, sample.value)
        for family in metrics.registry.collect()
        if family.name.startswith(DRIFT) and family.type == "gauge"
        for sample in family.samples
    ]
    return [
        Figure(" ".join([name.removeprefix("psim_"), *labels.values()]).replace("_", " "), value)
        for name, labels, value in samples
    ]
