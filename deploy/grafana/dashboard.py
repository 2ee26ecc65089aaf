"""Writes the Grafana dashboard.

`python deploy/grafana/dashboard.py > deploy/grafana/dashboards/psim.json` after every change here.

The variables of the dashboard choose a data source, namespaces, models and pods. Without Kubernetes
there are no such labels as `namespace` and `pod`, and "All" matches series without them.
"""

import sys
from dataclasses import dataclass

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh

from models.detection.screen import Finding

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
VARIABLES = {
    "namespace": "label_values(psim_build_info, namespace)",
    "model": "label_values(psim_ready, model)",
    "pod": 'label_values(psim_build_info{namespace=~"$namespace"}, pod)',
}
"""Queries for the values of each variable."""
NAMESPACE = 'namespace=~"$namespace"'
PODS = f'{{{NAMESPACE}, pod=~"$pod"}}'
"""Selects metrics of processes."""
MODELS = f'{{{NAMESPACE}, pod=~"$pod", model=~"$model"}}'
"""Selects metrics of models."""
PROCESSES = f'{{job="psim-gateway", {NAMESPACE}, pod=~"$pod"}}'
"""Selects metrics that every process has."""
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Chart:
    """A time series panel."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    """Expressions by legend."""
    exemplars: bool = False
    """Whether to show single requests, by their ids."""


def quantiles(metric: str, by: str = "", selector: str = MODELS) -> dict[str, str]:
    """Return queries for the median and the 99th percentile of a histogram."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"{name}{legend}": (
            f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{selector}{RATE})))"
        )
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }


def finding_chart(finding: Finding) -> Chart:
    """Return the chart of the inputs with a finding."""
    ratio = "job_model_finding:psim_findings:ratio"
    only = f'{{finding="{finding}", {NAMESPACE}, model=~"$model"}}'
    budget = f'job_model:psim_frr_budget:max{{{NAMESPACE}, model=~"$model"}}'
    return Chart(
        f"Share of inputs that are {finding}",
        "Over 30 minutes, beside the day before and three times the bundle's false-rejection "
        "budget. The alert fires above both, or above ten times the budget. Of all pods.",
        units.PercentUnit,
        {
            "last 30 min {{model}}": f"{ratio}_rate30m{only}",
            "day before {{model}}": f"{ratio}_rate1d{only}",
            "3 x budget {{model}}": f"3 * {budget}",
        },
    )


CHARTS: dict[str, list[Chart]] = {
    "Screen": [
        Chart(
            "Inputs by decision; texts of conversations that were seen before",
            "What was answered: allow, flag, sanitize or reject. The mode decides it, by the "
            "finding. Texts of a conversation that were seen before are not screened again.",
            units.CountsPerSecond,
            {
                "{{model}} {{decision}}": (
                    f"sum by (model, decision) (rate(psim_inputs_total{MODELS}{RATE}))"
                ),
                "{{model}} seen": f"sum by (model) (rate(psim_seen_texts_total{MODELS}{RATE}))",
            },
        ),
        finding_chart(Finding.TRIGGERED),
        finding_chart(Finding.UNFAMILIAR),
        Chart(
            "Rejected but for shadow mode; passed unscreened; could not be screened",
            "Shadow: inputs that enforce would reject. Fail open: classified although screening "
            "failed, must be 0. Not inspected: requests of proxies that were refused because they "
            "cannot be screened as they would be read.",
            units.CountsPerSecond,
            {
                "shadow {{model}}": f"sum by (model) (rate(psim_would_reject_total{MODELS}{RATE}))",
                "fail open {{model}}": f"sum by (model) (rate(psim_fail_open_total{MODELS}{RATE}))",
                "not inspected {{route}}": (
                    f"sum by (route) (rate(psim_not_inspected_total{PODS}{RATE}))"
                ),
            },
        ),
        Chart(
            "Share of inputs that were not read to their end",
            "Longer than the bundle reads. Nothing behind that was screened, or classified by the "
            "bundle's own classifier.",
            units.PercentUnit,
            {
                "{{model}}": (
                    f"sum by (model) (rate(psim_truncated_inputs_total{MODELS}{RATE})) / "
                    f"sum by (model) (rate(psim_screen_score_count{MODELS}{RATE}))"
                )
            },
        ),
        Chart(
            "Screen score (standard deviations)",
            "How extreme inputs are among clean texts of their class. From the threshold on, an "
            "input is extreme.",
            units.NoUnit,
            quantiles("psim_screen_score", "model"),
        ),
        Chart(
            "Override score",
            "Of inputs that the second stage was asked about: how firmly they keep their class "
            "beside clean texts of other classes.",
            units.NoUnit,
            quantiles("psim_screen_override", "model"),
        ),
        Chart(
            "Override tests by outcome",
            "Confirmed: triggered. Cleared: not. Skipped: over the budget PSIM_OVERRIDE_TOKENS_S, "
            "or the queue was full; the first stage then decides alone.",
            units.CountsPerSecond,
            {
                "{{model}} {{outcome}}": (
                    f"sum by (model, outcome) (rate(psim_override_tests_total{MODELS}{RATE}))"
                )
            },
        ),
        Chart(
            "Tokens that override tests cost",
            "Per second and replica. PSIM_OVERRIDE_TOKENS_S limits it.",
            units.CountsPerSecond,
            {"{{instance}} {{model}}": f"rate(psim_override_tokens_total{MODELS}{RATE})"},
        ),
        Chart(
            "PSIM confidence",
            "Confidence of the label-reset adapter. It stays near that of a guess on clean texts.",
            units.PercentUnit,
            quantiles("psim_screen_confidence", "model"),
        ),
        Chart(
            "Threshold (standard deviations)",
            "Score from which an input of a class is extreme. It changes with the bundle only.",
            units.NoUnit,
            {"{{model}} {{label}}": f"max by (model, label) (psim_threshold{MODELS})"},
        ),
        Chart(
            "Drift from the calibration texts",
            "Kolmogorov-Smirnov statistic of passing inputs' scores against those of the "
            "calibration. The alert fires above 20 %, from 500 inputs on.",
            units.PercentUnit,
            {"{{model}} {{label}}": f"max by (model, label) (psim_drift_statistic{MODELS})"},
        ),
        Chart(
            "Inputs in the drift measurement",
            "The latest inputs of a class that passed, 2,000 at most on each replica.",
            units.Short,
            {"{{model}} {{label}} {{instance}}": f"psim_drift_inputs{MODELS}"},
        ),
    ],
    "Requests": [
        Chart(
            "Requests by outcome",
            "Overloaded (429) and error (5xx) use up the error budget; a rejection is an answer.",
            units.RequestsPerSecond,
            {"{{outcome}}": f"sum by (outcome) (rate(psim_requests_total{PODS}{RATE}))"},
        ),
        Chart(
            "Share of failed requests",
            "The objective is 0.1 % at most. Of all pods.",
            units.PercentUnit,
            {
                f"last {window} {{{{namespace}}}}": (
                    f"job:psim_request_errors:ratio_rate{window}{{{NAMESPACE}}}"
                )
                for window in ("1h", "6h", "3d")
            },
        ),
        Chart(
            "Share of requests slower than a second",
            "The objective is 1 % at most, without explanations. Of all pods.",
            units.PercentUnit,
            {
                f"last {window} {{{{namespace}}}}": (
                    f"job:psim_slow_requests:ratio_rate{window}{{{NAMESPACE}}}"
                )
                for window in ("5m", "1h")
            },
        ),
        Chart(
            "Request duration",
            "By route. Dots are single requests, with their ids.",
            units.Seconds,
            quantiles("psim_request_duration_seconds", "route", PODS),
            exemplars=True,
        ),
        Chart(
            "Duration by stage",
            "Where the time goes. A long queue and a short screen: the load is too high. A long "
            "screen: the machine is too slow.",
            units.Seconds,
            quantiles("psim_stage_duration_seconds", "stage"),
        ),
    ],
    "Load": [
        Chart(
            "Queue, as a share of its limit",
            "At 100 %, requests are refused with 429.",
            units.PercentUnit,
            {
                f"{what} {{{{instance}}}} {{{{model}}}}": (
                    f"psim_queue_{what}{MODELS} / psim_max_queue_{what}"
                )
                for what in ("inputs", "characters", "seconds")
            },
        ),
        Chart(
            "Requests refused because of load",
            "By the limit that was reached.",
            units.RequestsPerSecond,
            {
                "{{model}} {{reason}}": (
                    f"sum by (model, reason) (rate(psim_overload_total{MODELS}{RATE}))"
                )
            },
        ),
        Chart(
            "Inputs per forward pass",
            "More under load: inputs that wait are screened together.",
            units.Short,
            quantiles("psim_batch_inputs"),
        ),
        Chart(
            "Padded tokens per forward pass",
            "What a forward pass costs.",
            units.Short,
            quantiles("psim_batch_tokens"),
        ),
        Chart(
            "Event-loop lag",
            "How late the event loop wakes a task. What blocks it delays every request, also "
            "/live and /ready.",
            units.Seconds,
            quantiles("psim_event_loop_lag_seconds", "instance", PODS),
        ),
        Chart(
            "CPU cores in use",
            "By replica.",
            units.Short,
            {"{{instance}}": f"rate(process_cpu_seconds_total{PROCESSES}{RATE})"},
        ),
        Chart(
            "Resident memory",
            "By replica. During a reload, the old bundle and the new one are in memory.",
            units.BytesIEC,
            {"{{instance}}": f"process_resident_memory_bytes{PROCESSES}"},
        ),
    ],
    "Challenger": [
        Chart(
            "Inputs by finding of the served bundle / the challenger",
            "Where both differ, the challenger would decide otherwise. Dropped: not compared, for "
            "load.",
            units.CountsPerSecond,
            {
                "{{model}} {{served}} / {{challenger}}": (
                    "sum by (model, served, challenger) "
                    f"(rate(psim_challenger_inputs_total{MODELS}{RATE}))"
                ),
                "{{model}} dropped": (
                    f"sum by (model) (rate(psim_challenger_dropped_total{MODELS}{RATE}))"
                ),
            },
        ),
        Chart(
            "Challenger score (standard deviations)",
            "As the screen score, by the challenger.",
            units.NoUnit,
            quantiles("psim_challenger_score", "model"),
        ),
    ],
    "Audit": [
        Chart(
            "Rows that wait for the audit store",
            "Up to PSIM_AUDIT_QUEUE; more are dropped. It grows while the store is down or too "
            "slow.",
            units.Short,
            {"{{instance}}": f"psim_audit_queue_rows{PODS}"},
        ),
        Chart(
            "Inputs missing from the audit",
            "Answered, but never to be in the audit.",
            units.CountsPerSecond,
            {"{{instance}}": f"rate(psim_audit_dropped_total{PODS}{RATE})"},
        ),
        Chart(
            "Inputs that sampling kept out of the audit",
            "Without a finding. PSIM_AUDIT_SAMPLE is the share that is kept; figures made of the "
            "audit allow for the rest.",
            units.CountsPerSecond,
            {"{{instance}}": f"rate(psim_audit_sampled_out_total{PODS}{RATE})"},
        ),
        Chart(
            "Failures of the audit store",
            "Each is tried again. Nothing is lost while the queue has room.",
            units.CountsPerSecond,
            {"{{instance}}": f"rate(psim_audit_failures_total{PODS}{RATE})"},
        ),
        Chart(
            "Findings pushed",
            "By outcome of each try. What failed is tried again.",
            units.CountsPerSecond,
            {"{{outcome}}": f"sum by (outcome) (rate(psim_pushed_findings_total{PODS}{RATE}))"},
        ),
        Chart(
            "Findings that wait to be pushed",
            "One process pushes at a time; the others say 0.",
            units.Short,
            {"{{instance}}": f"psim_push_pending{PODS}"},
        ),
        Chart(
            "Inputs that a reviewed exception let pass",
            "They have a finding. Each exception is one exact text.",
            units.CountsPerSecond,
            {"{{model}}": f"sum by (model) (rate(psim_excepted_inputs_total{PODS}{RATE}))"},
        ),
        Chart(
            "Exceptions in force; whether they are too old to count",
            "Stale: 1 while the store has not answered for a minute, and none counts.",
            units.Short,
            {
                "in force {{instance}}": f"psim_exceptions{PODS}",
                "stale {{instance}}": f"psim_exceptions_stale{PODS}",
            },
        ),
    ],
    "API keys": [
        Chart(
            "Requests refused for their key; passes over a key's rate limit",
            "Key: none or an unknown one (401). Scope: a key that may not do this (403).",
            units.CountsPerSecond,
            {
                "denied: {{reason}}": f"sum by (reason) (rate(psim_denied_total{PODS}{RATE}))",
                "limited": f"sum(rate(psim_rate_limited_passes_total{PODS}{RATE}))",
            },
        ),
        Chart(
            "Key file unusable; Redis failures in the last hour",
            "File: 1 while revoked keys still work. Redis: each replica counts rate limits on its "
            "own meanwhile.",
            units.Short,
            {
                "file {{instance}}": f"psim_keys_stale{PODS}",
                "Redis {{instance}}": f"increase(psim_limits_failures_total{PODS}[1h])",
            },
        ),
    ],
    "Replicas": [
        Chart(
            "Ready",
            "1 if the replica serves requests for the model.",
            units.Short,
            {"{{instance}} {{model}}": f"psim_ready{MODELS}"},
        ),
        Chart(
            "Worker restarts in the last hour",
            "The inference thread died. Even one is too many.",
            units.Short,
            {"{{instance}}": f"increase(psim_worker_restarts_total{MODELS}[1h])"},
        ),
        Chart(
            "Reloads in the last hour",
            "After a failed one, the previous models are still served.",
            units.Short,
            {"{{instance}} {{outcome}}": f"increase(psim_reloads_total{PODS}[1h])"},
        ),
        Chart(
            "Failures of the upstream classifier",
            "By kind, with PSIM_UPSTREAM only.",
            units.CountsPerSecond,
            {"{{kind}}": f"sum by (kind) (rate(psim_upstream_errors_total{MODELS}{RATE}))"},
        ),
        Chart(
            "Upstream compared with the bundle's model",
            "Same: share of carriers with the same label, as of the latest comparison. Difference: "
            "the largest of a score. The alert fires below 95 %. With PSIM_UPSTREAM only.",
            units.PercentUnit,
            {
                "same {{instance}} {{model}}": f"psim_upstream_parity{MODELS}",
                "difference {{instance}} {{model}}": f"psim_upstream_parity_difference{MODELS}",
            },
        ),
        Chart(
            "Carriers compared; comparisons that fail; upstream that gives other classes",
            "Compared: in the latest comparison. Failed: comparisons in the last hour. Other: 1 if "
            "the upstream's answers do not give the bundle's classes.",
            units.Short,
            {
                "compared {{instance}} {{model}}": f"psim_upstream_parity_texts{MODELS}",
                "failed {{instance}} {{model}}": (
                    f"increase(psim_upstream_parity_failures_total{MODELS}[1h])"
                ),
                "other {{instance}} {{model}}": f"psim_upstream_incomparable{MODELS}",
            },
        ),
        Chart(
            "Replicas by bundle",
            "Two bundles of one model at once belong to a rollout, and to nothing else.",
            units.Short,
            {
                "{{model}} {{digest}} {{engine}} {{dtype}}": (
                    f"count by (digest, engine, dtype, model) (psim_bundle_info{MODELS})"
                )
            },
        ),
        Chart(
            "Replicas by version",
            "Of the gateway.",
            units.Short,
            {"{{version}}": f"count by (version) (psim_build_info{PODS})"},
        ),
    ],
}


def panel(chart: Chart) -> Panel:
    """Return the panel of a chart."""
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST)
    legend = legend.placement(LegendPlacement.BOTTOM).show_legend(True)
    built = Panel().title(chart.title).unit(chart.unit).datasource(SOURCE).legend(legend)
    built = built.description(chart.description).height(8).span(12)
    for letter, (name, expression) in zip("ABCD", chart.queries.items(), strict=False):
        query = Dataquery().ref_id(letter).expr(expression).legend_format(name)
        built = built.with_target(query.exemplar(chart.exemplars))
    return built


def variable(name: str, query: str) -> QueryVariable:
    """Return a variable of which all values are chosen at first, and no value too."""
    built = QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(query)
    built = built.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True)
    everything = VariableOption(True, ["All"], ["$__all"])
    return built.include_all(True).all_value(".*").current(everything)


def dashboard() -> Dashboard:
    """Return the whole dashboard."""
    built = Dashboard("PSIM Gateway").uid("psim-gateway").tags(["psim"]).readonly()
    built = built.refresh("10s").time("now-1h", "now").timezone("browser")
    source = DatasourceVariable("datasource").label("Data source").type("prometheus")
    built = built.with_variable(source)
    for name, query in VARIABLES.items():
        built = built.with_variable(variable(name, query))
    for title, charts in CHARTS.items():
        built = built.with_row(Row(title))
        for chart in charts:
            built = built.with_panel(panel(chart))
    return built


if __name__ == "__main__":
    sys.stdout.write(JSONEncoder(sort_keys=True, indent=1).encode(dashboard().build()) + "\n")
