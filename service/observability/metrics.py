"""Prometheus metrics; every known label set exists from the start, as 0 and not as a gap.

Most are of a model, and have its name as a label. Requests have none: many fail before it is known.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)

from models.bundle.load import Bundle
from service.observability.drift import Comparison
from service.schemas import Decision
from service.settings import ModelSettings

ROUTES = (
    "/classify",
    "/screen",
    "/explain",
    "/predict",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/versions/{version}/infer",
    "/v1/classify",
    "/",
    "/models/{model:path}",
    "/envoy/{path:path}",
    "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
    "/beta/litellm_basic_guardrail_api",
)
OUTCOMES = ("ok", "rejected", "client_error", "overloaded", "error", "cancelled")
STAGES = ("queue", "tokenize", "screen", "sanitize", "classify", "upstream")
OVERLOADS = ("inputs", "characters", "seconds", "searches")
RELOADS = ("done", "failed")
DENIALS = ("key", "scope")
UPSTREAM_ERRORS = ("connect", "timeout", "broken", "status", "answer", "open")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)
# None under 0: a histogram with such buckets has no sum, and strict OpenMetrics parsers refuse it.
SCORES = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)
TOKENS = tuple(16 * 2**i for i in range(10))
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        # A custom registry has no process metrics until it is given the collectors.
        self.registry = r = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            r.register(collector)
        self.requests = Counter(
            "psim_requests", "Requests by how they ended", ["route", "outcome"], registry=r
        )
        self.request_seconds = Histogram(
            "psim_request_duration_seconds", "Request time", ["route"], buckets=SECONDS, registry=r
        )
        self.audit_dropped = Counter("psim_audit_dropped", "Inputs the audit lacks", registry=r)
        self.audit_failures = Counter(
            "psim_audit_failures", "Times that the audit store could not be used", registry=r
        )
        self.denied = Counter(
            "psim_denied",
            "Refused for the API key, before anything was read",
            ["reason"],
            registry=r,
        )
        for reason in DENIALS:
            self.denied.labels(reason)
        self.rate_limited = Counter(
            "psim_rate_limited_inputs", "Inputs refused for the limit of an API key", registry=r
        )
        self.limits_failures = Counter(
            "psim_limits_failures", "Times that Redis could not be asked for limits", registry=r
        )
        self.keys_stale = Gauge(
            "psim_keys_stale",
            "1 if the file of API keys has changed and cannot be used",
            registry=r,
        )
        self.reloads = Counter("psim_reloads", "Reloads of the models", ["outcome"], registry=r)
        for outcome in RELOADS:
            self.reloads.labels(outcome)
        for route in ROUTES:
            self.request_seconds.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)

        self.inputs = Counter(
            "psim_inputs", "Inputs by decision", ["model", "mode", "decision"], registry=r
        )
        self.would_reject = Counter(
            "psim_would_reject", "Inputs found poisoned in shadow mode", ["model"], registry=r
        )
        self.confidence = Histogram(
            "psim_screen_confidence",
            "PSIM confidence of inputs",
            ["model"],
            buckets=CONFIDENCES,
            registry=r,
        )
        self.score = Histogram(
            "psim_screen_score",
            "Standard deviations of inputs above clean texts of their class",
            ["model"],
            buckets=SCORES,
            registry=r,
        )
        self.stage_seconds = Histogram(
            "psim_stage_duration_seconds",
            "Time by stage",
            ["model", "stage"],
            buckets=SECONDS,
            registry=r,
        )
        self.batch_inputs = Histogram(
            "psim_batch_inputs", "Inputs per forward pass", ["model"], buckets=SIZES, registry=r
        )
        self.batch_tokens = Histogram(
            "psim_batch_tokens",
            "Padded tokens per forward pass",
            ["model"],
            buckets=TOKENS,
            registry=r,
        )
        self.queue_inputs = Gauge(
            "psim_queue_inputs", "Inputs waiting or running", ["model"], registry=r
        )
        self.queue_characters = Gauge(
            "psim_queue_characters", "Characters waiting or running", ["model"], registry=r
        )
        self.queue_seconds = Gauge(
            "psim_queue_seconds",
            "Time that what waits or runs will take, by the latest pace",
            ["model"],
            registry=r,
        )
        self.max_queue_inputs = Gauge(
            "psim_max_queue_inputs",
            "Inputs above which requests are refused",
            ["model"],
            registry=r,
        )
        self.max_queue_characters = Gauge(
            "psim_max_queue_characters",
            "Characters above which requests are refused",
            ["model"],
            registry=r,
        )
        self.max_queue_seconds = Gauge(
            "psim_max_queue_seconds",
            "Time that may go before a request; with more it is refused",
            ["model"],
            registry=r,
        )
        self.overload = Counter(
            "psim_overload", "Refused for load", ["model", "reason"], registry=r
        )
        self.worker_restarts = Counter(
            "psim_worker_restarts",
            "Attempts to restart the inference worker",
            ["model"],
            registry=r,
        )
        self.fail_open = Counter(
            "psim_fail_open", "Inputs classified although screening failed", ["model"], registry=r
        )
        self.upstream_errors = Counter(
            "psim_upstream_errors",
            "Failures of the classifier elsewhere",
            ["model", "kind"],
            registry=r,
        )
        self.drift_statistic = Gauge(
            "psim_drift_statistic",
            "Kolmogorov-Smirnov statistic of passing inputs' scores against clean texts'",
            ["model", "label"],
            registry=r,
        )
        self.drift_p_value = Gauge(
            "psim_drift_p_value", "p-value of psim_drift_statistic", ["model", "label"], registry=r
        )
        self.drift_inputs = Gauge(
            "psim_drift_inputs", "Passing inputs that were compared", ["model", "label"], registry=r
        )
        self.challenger_inputs = Counter(
            "psim_challenger_inputs",
            "Inputs by the verdicts of the served bundle and the challenger",
            ["model", "served", "challenger"],
            registry=r,
        )
        self.challenger_score = Histogram(
            "psim_challenger_score",
            "As psim_screen_score, by the challenger",
            ["model"],
            buckets=SCORES,
            registry=r,
        )
        self.challenger_dropped = Counter(
            "psim_challenger_dropped", "Inputs that the challenger lacks", ["model"], registry=r
        )
        self.ready = Gauge("psim_ready", "1 if requests are served", ["model"], registry=r)
        self.threshold = Gauge(
            "psim_threshold",
            "Score from which an input is poisoned",
            ["model", "label"],
            registry=r,
        )
        self.bundle_info = Gauge(
            "psim_bundle_info",
            "The bundle that is served",
            ["model", "digest", "engine", "dtype"],
            registry=r,
        )
        self._by_model = (
            self.inputs,
            self.would_reject,
            self.confidence,
            self.score,
            self.stage_seconds,
            self.batch_inputs,
            self.batch_tokens,
            self.queue_inputs,
            self.queue_characters,
            self.queue_seconds,
            self.max_queue_inputs,
            self.max_queue_characters,
            self.max_queue_seconds,
            self.overload,
            self.worker_restarts,
            self.fail_open,
            self.upstream_errors,
            self.challenger_inputs,
            self.challenger_score,
            self.challenger_dropped,
            self.ready,
        )
        self._known: set[str] = set()

    def of(self, model: str, settings: ModelSettings) -> "ModelMetrics":
        """Return the metrics of a model."""
        self._known.add(model)
        return ModelMetrics(self, model, settings)

    def describe(self, bundles: Mapping[str, Bundle]) -> None:
        """Say which bundles are served, by model; what there is of other models goes away."""
        for gone in self._known - bundles.keys():
            for metric in self._by_model:
                metric.remove_by_labels({"model": gone})
        self._known &= bundles.keys()
        self.threshold.clear()
        self.bundle_info.clear()
        for model, bundle in bundles.items():
            for index, label in enumerate(bundle.manifest.labels):
                self.threshold.labels(model, label).set(bundle.screen.threshold_of(index))
            engine = bundle.engine
            self.bundle_info.labels(model, bundle.digest, engine.name, engine.dtype).set(1)

    def compare(self, found: Mapping[str, Sequence[Comparison]]) -> None:
        """Say how what passes compares with calibration texts, by model."""
        for gauge in (self.drift_statistic, self.drift_p_value, self.drift_inputs):
            gauge.clear()
        for model, comparisons in found.items():
            for one in comparisons:
                for label in one.labels:
                    self.drift_statistic.labels(model, label).set(one.statistic)
                    self.drift_p_value.labels(model, label).set(one.p_value)
                    self.drift_inputs.labels(model, label).set(one.inputs)


VERDICTS = {False: "clean", True: "poisoned"}


class ModelMetrics:
    """The metrics of one model, as its settings have it."""

    def __init__(self, metrics: Metrics, model: str, settings: ModelSettings) -> None:
        self.would_reject = metrics.would_reject.labels(model)
        self.confidence = metrics.confidence.labels(model)
        self.score = metrics.score.labels(model)
        self.batch_inputs = metrics.batch_inputs.labels(model)
        self.batch_tokens = metrics.batch_tokens.labels(model)
        self.queue_inputs = metrics.queue_inputs.labels(model)
        self.queue_characters = metrics.queue_characters.labels(model)
        self.queue_seconds = metrics.queue_seconds.labels(model)
        self.worker_restarts = metrics.worker_restarts.labels(model)
        self.fail_open = metrics.fail_open.labels(model)
        self.ready = metrics.ready.labels(model)
        self.challenger_dropped = metrics.challenger_dropped.labels(model)
        self.challenger_score = metrics.challenger_score.labels(model)
        self.challenger_inputs = {
            (served, own): metrics.challenger_inputs.labels(model, VERDICTS[served], VERDICTS[own])
            for served in VERDICTS
            for own in VERDICTS
        }
        self.max_queue_inputs = metrics.max_queue_inputs.labels(model)
        self.max_queue_characters = metrics.max_queue_characters.labels(model)
        self.max_queue_seconds = metrics.max_queue_seconds.labels(model)
        self.inputs = {d: metrics.inputs.labels(model, settings.mode, d) for d in Decision}
        self.stage_seconds = {s: metrics.stage_seconds.labels(model, s) for s in STAGES}
        self.overload = {r: metrics.overload.labels(model, r) for r in OVERLOADS}
        self.upstream_errors = {
            k: metrics.upstream_errors.labels(model, k) for k in UPSTREAM_ERRORS
        }
