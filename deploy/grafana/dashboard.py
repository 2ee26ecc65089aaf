"""Writes the Grafana dashboard.

`python deploy/grafana/dashboard.py > deploy/grafana/dashboards/psim.json` after every change here.
"""

import sys
from dataclasses import dataclass

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from models.detection.screen import Finding

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Chart:
    """A time series panel."""

    title: str
    unit: str
    queries: dict[str, str]
    """Expressions by legend."""
    exemplars: bool = False
    """Whether to show single requests, by their ids."""


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Return queries for the median and the 99th percentile of a histogram."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"{name}{legend}": (
            f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{RATE})))"
        )
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }


def finding_chart(finding: Finding) -> Chart:
    """Return the chart of the inputs with a finding."""
    ratio = "job_model_finding:psim_findings:ratio"
    only = f'{{finding="{finding}"}}'
    return Chart(
        f"Share of inputs that are {finding}: last 30 min and the day before",
        units.PercentUnit,
        {
            "last 30 min {{model}}": f"{ratio}_rate30m{only}",
            "day before {{model}}": f"{ratio}_rate1d{only}",
        },
    )


CHARTS: dict[str, list[Chart]] = {
    "Screen": [
        Chart(
            "Inputs by decision",
            units.CountsPerSecond,
            {"{{model}} {{decision}}": f"sum by (model, decision) (rate(psim_inputs_total{RATE}))"},
        ),
        finding_chart(Finding.TRIGGERED),
        finding_chart(Finding.UNFAMILIAR),
        Chart(
            "Would be rejected but for shadow mode; passed unscreened; could not be screened",
            units.CountsPerSecond,
            {
                "shadow {{model}}": f"sum by (model) (rate(psim_would_reject_total{RATE}))",
                "fail open {{model}}": f"sum by (model) (rate(psim_fail_open_total{RATE}))",
                "not inspected {{route}}": f"sum by (route) (rate(psim_not_inspected_total{RATE}))",
            },
        ),
        Chart(
            "Share of inputs that were not read to their end",
            units.PercentUnit,
            {
                "{{model}}": (
                    f"sum by (model) (rate(psim_truncated_inputs_total{RATE})) / "
                    f"sum by (model) (rate(psim_screen_score_count{RATE}))"
                )
            },
        ),
        Chart(
            "Screen score (standard deviations)",
            units.NoUnit,
            quantiles("psim_screen_score", "model"),
        ),
        Chart(
            "Override score",
            units.NoUnit,
            quantiles("psim_screen_override", "model"),
        ),
        Chart(
            "Override tests by outcome; skipped: over the budget",
            units.CountsPerSecond,
            {
                "{{model}} {{outcome}}": (
                    f"sum by (model, outcome) (rate(psim_override_tests_total{RATE}))"
                )
            },
        ),
        Chart(
            "Tokens per second that override tests cost",
            units.CountsPerSecond,
            {"{{instance}} {{model}}": f"rate(psim_override_tokens_total{RATE})"},
        ),
        Chart("PSIM confidence", units.PercentUnit, quantiles("psim_screen_confidence", "model")),
        Chart(
            "Threshold (standard deviations)",
            units.NoUnit,
            {"{{model}} {{label}}": "max by (model, label) (psim_threshold)"},
        ),
        Chart(
            "Drift from the calibration texts (Kolmogorov-Smirnov; alert above 20 %)",
            units.PercentUnit,
            {"{{model}} {{label}}": "max by (model, label) (psim_drift_statistic)"},
        ),
        Chart(
            "Inputs in the drift measurement",
            units.Short,
            {"{{model}} {{label}} {{instance}}": "psim_drift_inputs"},
        ),
    ],
    "Requests": [
        Chart(
            "Requests by outcome",
            units.RequestsPerSecond,
            {"{{outcome}}": f"sum by (outcome) (rate(psim_requests_total{RATE}))"},
        ),
        Chart(
            "Share of failed requests (objective: at most 0.1 %)",
            units.PercentUnit,
            {
                "last hour": "job:psim_request_errors:ratio_rate1h",
                "last 6 hours": "job:psim_request_errors:ratio_rate6h",
            },
        ),
        Chart(
            "Request duration",
            units.Seconds,
            quantiles("psim_request_duration_seconds", "route"),
            exemplars=True,
        ),
        Chart(
            "Duration by stage", units.Seconds, quantiles("psim_stage_duration_seconds", "stage")
        ),
    ],
    "Load": [
        Chart(
            "Queue, as a share of its limit",
            units.PercentUnit,
            {
                f"{what} {{{{instance}}}} {{{{model}}}}": (
                    f"psim_queue_{what} / psim_max_queue_{what}"
                )
                for what in ("inputs", "characters", "seconds")
            },
        ),
        Chart(
            "Requests refused because of load",
            units.RequestsPerSecond,
            {"{{model}} {{reason}}": f"sum by (model, reason) (rate(psim_overload_total{RATE}))"},
        ),
        Chart("Inputs per forward pass", units.Short, quantiles("psim_batch_inputs")),
        Chart("Padded tokens per forward pass", units.Short, quantiles("psim_batch_tokens")),
        Chart(
            "CPU cores in use",
            units.Short,
            {"{{instance}}": f"rate(process_cpu_seconds_total{RATE})"},
        ),
        Chart("Resident memory", units.BytesIEC, {"{{instance}}": "process_resident_memory_bytes"}),
    ],
    "Challenger": [
        Chart(
            "Inputs by finding of the served bundle / the challenger",
            units.CountsPerSecond,
            {
                "{{model}} {{served}} / {{challenger}}": (
                    f"sum by (model, served, challenger) (rate(psim_challenger_inputs_total{RATE}))"
                ),
                "{{model}} dropped": f"sum by (model) (rate(psim_challenger_dropped_total{RATE}))",
            },
        ),
        Chart(
            "Challenger score (standard deviations)",
            units.NoUnit,
            quantiles("psim_challenger_score", "model"),
        ),
    ],
    "Audit": [
        Chart(
            "Inputs missing from the audit",
            units.CountsPerSecond,
            {"{{instance}}": f"rate(psim_audit_dropped_total{RATE})"},
        ),
        Chart(
            "Failures of the audit store",
            units.CountsPerSecond,
            {"{{instance}}": f"rate(psim_audit_failures_total{RATE})"},
        ),
    ],
    "API keys": [
        Chart(
            "Requests without a valid key or scope; inputs over a key's rate limit",
            units.CountsPerSecond,
            {
                "denied: {{reason}}": f"sum by (reason) (rate(psim_denied_total{RATE}))",
                "limited": f"sum(rate(psim_rate_limited_passes_total{RATE}))",
            },
        ),
        Chart(
            "Key file unusable; Redis failures in the last hour",
            units.Short,
            {
                "file {{instance}}": "psim_keys_stale",
                "Redis {{instance}}": "increase(psim_limits_failures_total[1h])",
            },
        ),
    ],
    "Replicas": [
        Chart("Ready", units.Short, {"{{instance}} {{model}}": "psim_ready"}),
        Chart(
            "Worker restarts in the last hour",
            units.Short,
            {"{{instance}}": "increase(psim_worker_restarts_total[1h])"},
        ),
        Chart(
            "Reloads in the last hour",
            units.Short,
            {"{{instance}} {{outcome}}": "increase(psim_reloads_total[1h])"},
        ),
        Chart(
            "Failures of the upstream classifier",
            units.CountsPerSecond,
            {"{{kind}}": f"sum by (kind) (rate(psim_upstream_errors_total{RATE}))"},
        ),
        Chart(
            "Replicas by bundle",
            units.Short,
            {"{{model}} {{digest}}": "count by (digest, engine, dtype, model) (psim_bundle_info)"},
        ),
    ],
}


def panel(chart: Chart) -> Panel:
    """Return the panel of a chart."""
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST)
    legend = legend.placement(LegendPlacement.BOTTOM).show_legend(True)
    built = Panel().title(chart.title).unit(chart.unit).datasource(SOURCE).legend(legend)
    built = built.height(8).span(12)
    for letter, (name, expression) in zip("ABCD", chart.queries.items(), strict=False):
        query = Dataquery().ref_id(letter).expr(expression).legend_format(name)
        built = built.with_target(query.exemplar(chart.exemplars))
    return built


def dashboard() -> Dashboard:
    """Return the whole dashboard."""
    built = Dashboard("PSIM Gateway").uid("psim-gateway").tags(["psim"]).readonly()
    built = built.refresh("10s").time("now-1h", "now").timezone("browser")
    for title, charts in CHARTS.items():
        built = built.with_row(Row(title))
        for chart in charts:
            built = built.with_panel(panel(chart))
    return built


if __name__ == "__main__":
    sys.stdout.write(JSONEncoder(sort_keys=True, indent=1).encode(dashboard().build()) + "\n")
