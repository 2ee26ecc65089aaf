"""Prometheus metrics.

Every known label set exists from the start, as 0 and not as a gap. Most metrics have the name of a
model as a label. Those of requests have not: many requests fail before their model is known.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from models.bundle.load import Bundle
from models.detection.screen import Finding
from service.observability.drift import Comparison
from service.route_table import AUTHZ, COUNTED_ROUTES, EXT_PROC, GUARDRAIL_ROUTES
from service.schemas import Decision
from service.settings import Mode, ModelSettings

ROUTES = COUNTED_ROUTES
ASKED_BY_PROXIES = (AUTHZ, EXT_PROC, *GUARDRAIL_ROUTES)
OUTCOMES = ("ok", "rejected", "client_error", "overloaded", "error", "cancelled")
TESTS = ("confirmed", "cleared", "skipped")
STAGES = ("queue", "tokenize", "screen", "override", "sanitize", "classify", "upstream")
OVERLOADS = ("inputs", "characters", "seconds", "searches")
RELOADS = ("done", "failed")
DENIALS = ("key", "scope")
PUSHES = ("delivered", "failed")
UPSTREAM_ERRORS = ("connect", "timeout", "broken", "status", "answer", "open")
MODEL = ("model",)
FINDINGS = {None: "none"} | {finding: str(finding) for finding in Finding}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)
# None under 0: a histogram with such buckets has no sum, and strict OpenMetrics parsers refuse it.
SCORES = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)
OVERRIDES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
TOKENS = tuple(16 * 2**i for i in range(10))
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# When a counter began is of no use to our rules, and costs a series each.
disable_created_metrics()  # type: ignore[no-untyped-call]


class MetricGroup:
    """Some metrics, in a registry that all groups of an object share."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()


class RequestMetrics(MetricGroup):
    """How requests ended, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Counter(
            "psim_requests",
            "Requests by how they ended",
            ["route", "outcome"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "psim_request_duration_seconds",
            "Request time",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        for route in ROUTES:
            self.request_seconds.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)
        self.not_inspected = Counter(
            "psim_not_inspected",
            "Requests that did not pass since they could not be screened as they would be read",
            ["route"],
            registry=self.registry,
        )
        for route in ASKED_BY_PROXIES:
            self.not_inspected.labels(route)


class AccessMetrics(MetricGroup):
    """API keys and their rate limits."""

    def __init__(self) -> None:
        super().__init__()
        counter = partial(Counter, registry=self.registry)
        self.denied = counter(
            "psim_denied", "Refused for the API key, before anything was read", ["reason"]
        )
        for reason in DENIALS:
            self.denied.labels(reason)
        self.rate_limited = counter(
            "psim_rate_limited_passes", "Passes refused for the limit of an API key"
        )
        self.limits_failures = counter(
            "psim_limits_failures", "Times that Redis could not be asked for limits"
        )
        self.keys_stale = Gauge(
            "psim_keys_stale",
            "1 if the file of API keys has changed and cannot be used",
            registry=self.registry,
        )


class AuditMetrics(MetricGroup):
    """What waits for the audit, and what the audit lacks."""

    def __init__(self) -> None:
        super().__init__()
        counter = partial(Counter, registry=self.registry)
        self.audit_dropped = counter("psim_audit_dropped", "Inputs the audit lacks")
        self.audit_sampled_out = counter(
            "psim_audit_sampled_out", "Inputs without a finding that sampling kept out of the audit"
        )
        self.audit_failures = counter(
            "psim_audit_failures", "Times that the audit store could not be used"
        )
        self.audit_queue_rows = Gauge(
            "psim_audit_queue_rows", "Rows that wait for the audit store", registry=self.registry
        )
        pushed = counter("psim_pushed_findings", "Tries to push a finding", ["outcome"])
        self.pushed = {outcome: pushed.labels(outcome) for outcome in PUSHES}
        gauge = partial(Gauge, registry=self.registry)
        self.push_pending = gauge(
            "psim_push_pending", "Findings that wait to be pushed, in the process that pushes"
        )
        self.push_lag = gauge(
            "psim_push_lag_seconds", "Age of the oldest of them, in the process that pushes"
        )
        self.exceptions = Gauge(
            "psim_exceptions", "Reviewed exceptions in force", registry=self.registry
        )
        self.exceptions_stale = Gauge(
            "psim_exceptions_stale",
            "1 if the exceptions could not be read for so long that none of them counts",
            registry=self.registry,
        )


class ProcessMetrics(MetricGroup):
    """The process: its version, its reloads, and how promptly its event loop runs."""

    def __init__(self) -> None:
        super().__init__()
        # A registry of our own has no process metrics until it is given the collectors.
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            self.registry.register(collector)
        build = Gauge("psim_build_info", "The version", ["version"], registry=self.registry)
        build.labels(version("psim-gateway")).set(1)
        self.event_loop_lag = Histogram(
            "psim_event_loop_lag_seconds",
            "Time by which the event loop woke a task too late",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.reloads = Counter(
            "psim_reloads", "Reloads of the models", ["outcome"], registry=self.registry
        )
        for outcome in RELOADS:
            self.reloads.labels(outcome)


class ModelFamilies:
    """The metrics that have the name of a model as a label, for all models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.inputs = counter("psim_inputs", "Inputs by decision", ["model", "mode", "decision"])
        self.would_reject = counter(
            "psim_would_reject", "Inputs in shadow mode that enforce would reject", MODEL
        )
        self.findings = counter(
            "psim_findings", "Screened inputs with a finding", ["model", "finding"]
        )
        self.truncated_inputs = counter(
            "psim_truncated_inputs", "Screened inputs that were not read to their end", MODEL
        )
        self.confidence = histogram(
            "psim_screen_confidence", "PSIM confidence of inputs", MODEL, buckets=CONFIDENCES
        )
        self.score = histogram(
            "psim_screen_score",
            "Standard deviations of inputs above clean texts of their class",
            MODEL,
            buckets=SCORES,
        )
        self.override = histogram(
            "psim_screen_override",
            "Scores of the override test, of inputs about which it was asked",
            MODEL,
            buckets=OVERRIDES,
        )
        self.override_tests = counter(
            "psim_override_tests",
            "Override tests by outcome, and whether the first stage suspected the input",
            ["model", "outcome", "suspected"],
        )
        self.override_tokens = counter(
            "psim_override_tokens", "Tokens that override tests have cost", MODEL
        )
        self.stage_seconds = histogram(
            "psim_stage_duration_seconds", "Time by stage", ["model", "stage"], buckets=SECONDS
        )
        self.batch_inputs = histogram(
            "psim_batch_inputs", "Inputs per forward pass", MODEL, buckets=SIZES
        )
        self.batch_tokens = histogram(
            "psim_batch_tokens", "Padded tokens per forward pass", MODEL, buckets=TOKENS
        )
        self.queue_inputs = gauge("psim_queue_inputs", "Inputs waiting or running", MODEL)
        self.queue_characters = gauge(
            "psim_queue_characters", "Characters waiting or running", MODEL
        )
        self.queue_seconds = gauge(
            "psim_queue_seconds",
            "Time that what waits or runs will take, by the latest pace",
            MODEL,
        )
        self.max_queue_inputs = gauge(
            "psim_max_queue_inputs", "Inputs above which requests are refused", MODEL
        )
        self.max_queue_characters = gauge(
            "psim_max_queue_characters", "Characters above which requests are refused", MODEL
        )
        self.max_queue_seconds = gauge(
            "psim_max_queue_seconds",
            "Time that may go before a request; with more it is refused",
            MODEL,
        )
        self.overload = counter("psim_overload", "Refused for load", ["model", "reason"])
        self.worker_restarts = counter(
            "psim_worker_restarts", "Attempts to restart the inference worker", MODEL
        )
        self.fail_open = counter(
            "psim_fail_open", "Inputs classified although screening failed", MODEL
        )
        self.seen_texts = counter(
            "psim_seen_texts", "Texts of conversations that were not screened again", MODEL
        )
        self.excepted_inputs = counter(
            "psim_excepted_inputs",
            "Inputs with a finding that a reviewed exception let pass",
            MODEL,
        )
        self.upstream_errors = counter(
            "psim_upstream_errors", "Failures of the classifier elsewhere", ["model", "kind"]
        )
        self.upstream_parity = gauge(
            "psim_upstream_parity",
            "Share of the carriers that the upstream gives the label of the bundle's victim",
            MODEL,
        )
        self.upstream_parity_texts = gauge(
            "psim_upstream_parity_texts", "Carriers in psim_upstream_parity", MODEL
        )
        self.upstream_parity_difference = gauge(
            "psim_upstream_parity_difference",
            "Largest difference of a score between the upstream and the bundle's victim",
            MODEL,
        )
        self.upstream_incomparable = gauge(
            "psim_upstream_incomparable",
            "1 if the upstream's answers give no scores of the bundle's classes",
            MODEL,
        )
        self.upstream_parity_failures = counter(
            "psim_upstream_parity_failures",
            "Comparisons of the upstream with the bundle's victim that failed",
            MODEL,
        )
        self.drift_statistic = gauge(
            "psim_drift_statistic",
            "Kolmogorov-Smirnov statistic of passing inputs' scores against clean texts'",
            ["model", "label"],
        )
        self.drift_p_value = gauge(
            "psim_drift_p_value", "p-value of psim_drift_statistic", ["model", "label"]
        )
        self.drift_inputs = gauge(
            "psim_drift_inputs", "Passing inputs that were compared", ["model", "label"]
        )
        self.challenger_inputs = counter(
            "psim_challenger_inputs",
            "Inputs by the findings of the served bundle and the challenger",
            ["model", "served", "challenger"],
        )
        self.challenger_score = histogram(
            "psim_challenger_score",
            "As psim_screen_score, by the challenger",
            MODEL,
            buckets=SCORES,
        )
        self.challenger_dropped = counter(
            "psim_challenger_dropped", "Inputs that the challenger lacks", MODEL
        )
        self.ready = gauge("psim_ready", "1 if requests are served", MODEL)
        self.threshold = gauge(
            "psim_threshold", "Score from which an input is extreme", ["model", "label"]
        )
        self.frr_budget = gauge(
            "psim_frr_budget", "Share of clean texts that the bundle may find extreme", MODEL
        )
        self.bundle_info = gauge(
            "psim_bundle_info", "The bundle that is served", ["model", "digest", "engine", "dtype"]
        )


class Metrics(RequestMetrics, AccessMetrics, AuditMetrics, ProcessMetrics):
    """All metrics of one application; a part names in its annotation the group it needs."""

    def __init__(self) -> None:
        super().__init__()
        self._families = ModelFamilies(self.registry)
        self._models: set[str] = set()

    def of(self, model: str, settings: ModelSettings) -> "ModelMetrics":
        """Return the metrics of a model."""
        self._models.add(model)
        return ModelMetrics(self._families, model, settings)

    def describe(self, bundles: Mapping[str, Bundle]) -> None:
        """Set what is known of the served bundles, by model; drop the metrics of other models."""
        families = self._families
        for model in self._models - bundles.keys():
            for family in vars(families).values():
                family.remove_by_labels({"model": model})
        self._models &= bundles.keys()
        families.threshold.clear()
        families.frr_budget.clear()
        families.bundle_info.clear()
        for model, bundle in bundles.items():
            for index, label in enumerate(bundle.manifest.classes):
                families.threshold.labels(model, label).set(bundle.screen.threshold_of(index))
            families.frr_budget.labels(model).set(bundle.manifest.frr_budget)
            engine = bundle.engine
            families.bundle_info.labels(model, bundle.digest, engine.name, engine.dtype).set(1)

    def compare(self, drift: Mapping[str, Sequence[Comparison]]) -> None:
        """Set the drift of passing inputs from the calibration texts, by model."""
        families = self._families
        for gauge in (families.drift_statistic, families.drift_p_value, families.drift_inputs):
            gauge.clear()
        for model, comparisons in drift.items():
            for group in comparisons:
                for label in group.labels:
                    families.drift_statistic.labels(model, label).set(group.statistic)
                    families.drift_p_value.labels(model, label).set(group.p_value)
                    families.drift_inputs.labels(model, label).set(group.inputs)


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, families: ModelFamilies, model: str, settings: ModelSettings) -> None:
        self.would_reject = families.would_reject.labels(model)
        self.truncated_inputs = families.truncated_inputs.labels(model)
        self.confidence = families.confidence.labels(model)
        self.score = families.score.labels(model)
        self.override = families.override.labels(model)
        self.override_tests = {
            (outcome, suspected): families.override_tests.labels(
                model, outcome, "yes" if suspected else "no"
            )
            for outcome in TESTS
            for suspected in (True, False)
        }
        self.override_tokens = families.override_tokens.labels(model)
        self.findings = {f: families.findings.labels(model, f) for f in Finding}
        self.batch_inputs = families.batch_inputs.labels(model)
        self.batch_tokens = families.batch_tokens.labels(model)
        self.queue_inputs = families.queue_inputs.labels(model)
        self.queue_characters = families.queue_characters.labels(model)
        self.queue_seconds = families.queue_seconds.labels(model)
        self.worker_restarts = families.worker_restarts.labels(model)
        self.fail_open = families.fail_open.labels(model)
        self.seen_texts = families.seen_texts.labels(model)
        self.excepted_inputs = families.excepted_inputs.labels(model)
        self.ready = families.ready.labels(model)
        self._bind_parity(families, model)
        self.challenger_dropped = families.challenger_dropped.labels(model)
        self.challenger_score = families.challenger_score.labels(model)
        self.challenger_inputs = {
            (served, new): families.challenger_inputs.labels(model, FINDINGS[served], FINDINGS[new])
            for served in FINDINGS
            for new in FINDINGS
        }
        self.max_queue_inputs = families.max_queue_inputs.labels(model)
        self.max_queue_characters = families.max_queue_characters.labels(model)
        self.max_queue_seconds = families.max_queue_seconds.labels(model)
        self._inputs, self._model = families.inputs, model
        for decision in Decision:
            self.inputs(settings.mode, decision)
        self.stage_seconds = {s: families.stage_seconds.labels(model, s) for s in STAGES}
        self.overload = {r: families.overload.labels(model, r) for r in OVERLOADS}
        self.upstream_errors = {
            k: families.upstream_errors.labels(model, k) for k in UPSTREAM_ERRORS
        }

    def _bind_parity(self, families: ModelFamilies, model: str) -> None:
        self.upstream_parity = families.upstream_parity.labels(model)
        self.upstream_parity_texts = families.upstream_parity_texts.labels(model)
        self.upstream_parity_difference = families.upstream_parity_difference.labels(model)
        self.upstream_incomparable = families.upstream_incomparable.labels(model)
        self.upstream_parity_failures = families.upstream_parity_failures.labels(model)

    def inputs(self, mode: Mode, decision: Decision) -> Counter:
        """Return the counter of inputs; keys may have modes other than the service's."""
        return self._inputs.labels(self._model, mode, decision)
