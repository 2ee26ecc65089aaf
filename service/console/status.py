"""Status of the models that this process serves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from models.bundle.manifest import KnownTrigger
from service.console.formatting import percent
from service.observability.drift import Comparison
from service.observability.metrics import Metrics
from service.pipeline.gateway import Gateway
from service.pipeline.upstream_parity import ParityState, UpstreamParity
from service.settings import AuditSettings

PARITY = {
    ParityState.OFF: "not compared, PSIM_UPSTREAM_PARITY_S is 0",
    ParityState.NO_CARRIERS: "not compared, the bundle has no carriers",
    ParityState.PENDING: "not compared yet",
    ParityState.COMPARED: "compared",
    ParityState.INCOMPARABLE: "its answers cannot be compared",
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Threshold of one predicted class, or of several that share it."""

    labels: Sequence[str]
    value: float
    texts: int
    """Texts that it was calibrated with."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number with its name."""

    name: str
    value: float
    limit: float | None = None
    """Most that the settings allow."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A model: its gateway and its bundle."""

    unready_reason: str | None
    """Why requests are not served; None if they are."""
    worker: str
    mode: str
    model: str
    elsewhere: bool
    """Whether the classifier is deployed elsewhere."""
    upstream: str | None
    """Protocol of the upstream; None without one, or while not known."""
    parity: str | None
    """Whether the upstream is the bundle's model, in words; None without an upstream."""
    engine: str
    digest: str
    budget: float
    views: int
    """Labels that are judged each by itself; 1 if the classifier gives one label."""
    known_triggers: Sequence[KnownTrigger]
    """Found by a scan of the model."""
    thresholds: Sequence[Threshold]
    measurements: Sequence[Measurement]
    """Queue and failures since the process started."""
    drift: Sequence[Measurement]
    sample: float
    """Share of the inputs without a finding that the audit keeps."""
    keeps_texts: bool
    keeps_hmacs: bool
    """Whether texts are known by their HMAC, as exceptions need."""


def predicted_class(statuses: Sequence[ServiceStatus], digest: str, threshold: float) -> str | None:
    """Return the class, or classes, with this threshold; None if the bundle is not served."""
    return next(
        (
            ", ".join(one.labels)
            for status in statuses
            if status.digest == digest
            for one in status.thresholds
            if one.value == threshold
        ),
        None,
    )


def service_status(gateway: Gateway, metrics: Metrics, settings: AuditSettings) -> ServiceStatus:
    """Return the status of a model now."""
    bundle, model = gateway.bundle, gateway.model_info.model
    labels = bundle.manifest.classes
    return ServiceStatus(
        unready_reason=gateway.unready_reason,
        worker=gateway.health,
        mode=gateway.mode,
        model=model,
        elsewhere=gateway.elsewhere,
        upstream=gateway.upstream_protocol,
        parity=parity_in_words(gateway.upstream_parity),
        engine=f"{bundle.engine.name}, {bundle.engine.dtype}",
        digest=bundle.digest,
        budget=bundle.manifest.frr_budget,
        views=len(bundle.manifest.views),
        known_triggers=bundle.manifest.known_triggers,
        thresholds=[
            Threshold([labels[i] for i in group.classes], group.threshold, len(group.scores))
            for group in bundle.screen.groups
        ],
        measurements=_measurements(_values(metrics, model)),
        drift=[number for group in gateway.drift.measure() for number in _drift(group)],
        sample=settings.audit_sample,
        keeps_texts=settings.audit_text,
        keeps_hmacs=settings.audit_key is not None,
    )


def parity_in_words(parity: UpstreamParity | None) -> str | None:
    """Return how an upstream compares with the bundle's model; None without an upstream."""
    if parity is None:
        return None
    if parity.same is None:
        return PARITY[parity.state]
    return f"same label for {percent(parity.same)} of {parity.texts} texts"


def _values(metrics: Metrics, model: str) -> Callable[[str], float]:
    """Return a function that looks up a metric, of this model if it is by model."""
    samples = [
        sample
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("model", model) == model
    ]
    return lambda name: sum(s.value for s in samples if s.name == f"psim_{name}")


def _measurements(value: Callable[[str], float]) -> list[Measurement]:
    return [
        Measurement("Inputs in the queue", value("queue_inputs"), value("max_queue_inputs")),
        Measurement(
            "Characters in the queue", value("queue_characters"), value("max_queue_characters")
        ),
        Measurement("Restarts of the worker", value("worker_restarts_total")),
        Measurement("Inputs passed unscreened", value("fail_open_total")),
        Measurement("Inputs the audit lacks", value("audit_dropped_total")),
        Measurement("Failures of the audit store", value("audit_failures_total")),
    ]


def _drift(group: Comparison) -> Iterator[Measurement]:
    labels = ", ".join(group.labels)
    yield Measurement(f"Statistic, {labels}", group.statistic)
    yield Measurement(f"p-value, {labels}", group.p_value)
    yield Measurement(f"Inputs, {labels}", group.inputs)
