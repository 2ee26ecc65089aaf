"""Prometheus metrics; every known label set exists from the start, as 0 and not as a gap."""

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)

from models.bundle import Bundle
from service.schemas import Decision
from service.settings import Mode

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
    "/beta/litellm_basic_guardrail_api",
)
OUTCOMES = ("ok", "rejected", "client_error", "overloaded", "error", "cancelled")
STAGES = ("queue", "tokenize", "screen", "sanitize", "classify", "upstream")
OVERLOADS = ("inputs", "characters", "searches")
DENIALS = ("key", "scope")
UPSTREAM_ERRORS = ("connect", "timeout", "broken", "status", "answer", "open")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)
# None under 0: a histogram with such buckets has no sum, and strict OpenMetrics parsers refuse it.
SCORES = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self, bundle: Bundle, mode: Mode) -> None:
        # A custom registry has no process metrics until it is given the collectors.
        self.registry = r = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            r.register(collector)
        self.requests = Counter(
            "psim_requests", "Requests by how they ended", ["route", "outcome"], registry=r
        )
        self.inputs = Counter("psim_inputs", "Inputs by decision", ["decision", "mode"], registry=r)
        self.would_reject = Counter(
            "psim_would_reject", "Inputs found poisoned in shadow mode", registry=r
        )
        self.confidence = Histogram(
            "psim_screen_confidence", "PSIM confidence of inputs", buckets=CONFIDENCES, registry=r
        )
        self.score = Histogram(
            "psim_screen_score",
            "Standard deviations of inputs above clean texts of their class",
            buckets=SCORES,
            registry=r,
        )
        self.request_seconds = Histogram(
            "psim_request_duration_seconds", "Request time", ["route"], buckets=SECONDS, registry=r
        )
        self.stage_seconds = Histogram(
            "psim_stage_duration_seconds", "Time by stage", ["stage"], buckets=SECONDS, registry=r
        )
        self.batch_inputs = Histogram(
            "psim_batch_inputs", "Inputs per forward pass", buckets=SIZES, registry=r
        )
        self.batch_tokens = Histogram(
            "psim_batch_tokens",
            "Padded tokens per forward pass",
            buckets=[16 * 2**i for i in range(10)],
            registry=r,
        )
        self.queue_inputs = Gauge("psim_queue_inputs", "Inputs waiting or running", registry=r)
        self.queue_characters = Gauge(
            "psim_queue_characters", "Characters waiting or running", registry=r
        )
        self.max_queue_inputs = Gauge(
            "psim_max_queue_inputs", "Inputs above which requests are refused", registry=r
        )
        self.max_queue_characters = Gauge(
            "psim_max_queue_characters", "Characters above which requests are refused", registry=r
        )
        self.overload = Counter("psim_overload", "Refused for load", ["reason"], registry=r)
        self.denied = Counter(
            "psim_denied",
            "Refused for the API key, before anything was read",
            ["reason"],
            registry=r,
        )
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
        self.worker_restarts = Counter(
            "psim_worker_restarts", "Attempts to restart the inference worker", registry=r
        )
        self.fail_open = Counter(
            "psim_fail_open", "Inputs classified although screening failed", registry=r
        )
        self.audit_dropped = Counter("psim_audit_dropped", "Inputs the audit lacks", registry=r)
        self.audit_failures = Counter(
            "psim_audit_failures", "Times that the audit store could not be used", registry=r
        )
        self.upstream_errors = Counter(
            "psim_upstream_errors", "Failures of the classifier elsewhere", ["kind"], registry=r
        )
        self.ready = Gauge("psim_ready", "1 if requests are served", registry=r)
        self._initialise(mode)
        self._describe(bundle)

    def _initialise(self, mode: Mode) -> None:
        for route in ROUTES:
            self.request_seconds.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)
        for decision in Decision:
            self.inputs.labels(decision, mode)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for reason in OVERLOADS:
            self.overload.labels(reason)
        for reason in DENIALS:
            self.denied.labels(reason)
        for kind in UPSTREAM_ERRORS:
            self.upstream_errors.labels(kind)

    def _describe(self, bundle: Bundle) -> None:
        threshold = Gauge(
            "psim_threshold",
            "Score from which an input is poisoned",
            ["label"],
            registry=self.registry,
        )
        for index, label in enumerate(bundle.manifest.labels):
            threshold.labels(label).set(bundle.screen.threshold_of(index))
        info = Gauge(
            "psim_bundle_info",
            "The bundle that is served",
            ["digest", "engine", "dtype", "model"],
            registry=self.registry,
        )
        engine, model = bundle.engine, bundle.manifest.victim.name
        info.labels(bundle.digest, engine.name, engine.dtype, model).set(1)
