"""What the first page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from models.detection.conformal import min_calibration_size
from service.audit import statistics as figures
from service.audit.statistics import ScoreGroup, Tally, TrafficStatistics
from service.console import plots
from service.console.formatting import number, percent
from service.console.plots import Plot
from service.console.query import PERIODS, ConsoleQuery

GROUPS = 12
"""Plots of scores; thresholds with fewer inputs have none."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A position of a slider: inputs that would be flagged."""

    name: str
    tally: Tally
    share: float
    says: str
    tenth: int | None = None
    """Of the thresholds."""


@dataclass(frozen=True, slots=True)
class Overview:
    """Figures and plots."""

    traffic: TrafficStatistics
    rate: Plot
    volume: Plot
    scores: Sequence[tuple[ScoreGroup, Plot]]
    left_out: int
    """Thresholds without a plot."""
    thresholds: Sequence[Choice]
    budgets: Sequence[Choice]
    confidence: Plot
    confidences: Sequence[tuple[float, int, int]]
    """Upper end of a range, inputs that passed, inputs that were flagged."""


def overview(connection: sa.Connection, asked: ConsoleQuery, now: datetime, texts: int) -> Overview:
    """Ask the audit.

    Args:
        connection: to the audit.
        asked: which inputs.
        now: the end of the time.
        texts: of the smallest calibration group of the bundle; budgets that it is too small for
            are left out.
    """
    scope, (_, _, width) = asked.scope(now), PERIODS[asked.period]
    traffic = figures.traffic(connection, scope, int(width.total_seconds()))
    groups = figures.groups(connection, scope)
    ranges = figures.confidences(connection, scope)
    shown = groups[:GROUPS]
    most = max((tally.inputs for group in shown for tally in group.tenths), default=0)
    factors = {
        "the thresholds as they are" if factor == 1 else f"{factor:.1f} times the thresholds": tally
        for factor, tally in figures.by_factor(groups).items()
    }
    budgets = {
        f"a budget of {percent(budget)}": tally
        for budget, tally in figures.by_budget(connection, scope).items()
        if min_calibration_size(budget) <= texts
    }
    return Overview(
        traffic,
        plots.rate_plot(traffic.slots, width),
        plots.volume_plot(traffic.slots, width),
        [(group, plots.score_plot(group, most)) for group in shown],
        len(groups) - len(shown),
        _choices(factors, traffic, figures.FACTORS),
        _choices(budgets, traffic, [None] * len(budgets)),
        plots.confidence_plot(ranges),
        [(edge, *counts) for edge, counts in zip(figures.CONFIDENCES, ranges, strict=True)],
    )


def _choices(
    found: Mapping[str, Tally], traffic: TrafficStatistics, tenths: Sequence[int | None]
) -> list[Choice]:
    now = traffic.flagged
    made = []
    for (name, tally), tenth in zip(found.items(), tenths, strict=True):
        more = tally.inputs - now.inputs
        change = (
            f"{number(abs(more))} {'more' if more > 0 else 'fewer'} than now" if more else "as now"
        )
        share = tally.inputs / traffic.inputs if traffic.inputs else 0.0
        says = (
            f"At {name}: {number(tally.inputs)} of {number(traffic.inputs)} inputs flagged "
            f"({percent(share)}, {change}). Of those marked so far: "
            f"{tally.poisoned} of {now.poisoned} poisoned, "
            f"{tally.false_alarms} of {now.false_alarms} false alarms."
        )
        made.append(Choice(name, tally, share, says, tenth))
    return made
