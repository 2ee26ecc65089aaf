"""Statistics and plots of the first page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from models.detection.conformal import min_calibration_size
from service.audit import statistics
from service.audit.statistics import ScoreGroup, Tally, TrafficStatistics
from service.console import plots
from service.console.formatting import number, percent
from service.console.plots import Plot
from service.console.query import PERIODS, ConsoleQuery

GROUPS = 12
"""Most plots of scores; the thresholds with fewest inputs have none."""


@dataclass(frozen=True, slots=True)
class SliderChoice:
    """A position of a slider: the inputs that would be flagged."""

    name: str
    tally: Tally
    share: float
    summary: str
    tenth: int | None = None
    """Tenths of the thresholds, if the slider is about them."""


@dataclass(frozen=True, slots=True)
class Overview:
    """Statistics and plots."""

    traffic: TrafficStatistics
    rate: Plot
    volume: Plot
    scores: Sequence[tuple[ScoreGroup, Plot]]
    thresholds_without_plot: int
    thresholds: Sequence[SliderChoice]
    budgets: Sequence[SliderChoice]
    confidence: Plot
    confidences: Sequence[tuple[float, int, int]]
    """Upper end of a range, inputs that passed, inputs that were flagged."""


def overview(
    connection: sa.Connection, query: ConsoleQuery, now: datetime, texts: Mapping[str, int]
) -> Overview:
    """Compute the overview from the audit.

    Args:
        connection: to the audit.
        query: which inputs.
        now: end of the period.
        texts: size of the smallest calibration group, by digest of a served bundle. Budgets that
            need more texts than the bundles of these inputs have are left out.
    """
    scope, (_, _, width) = query.scope(now), PERIODS[query.period]
    traffic = statistics.traffic(connection, scope, int(width.total_seconds()))
    groups = statistics.groups(connection, scope)
    ranges = statistics.confidences(connection, scope)
    plotted = groups[:GROUPS]
    highest = max((tally.inputs for group in plotted for tally in group.tenths), default=0)
    factors = {
        "the thresholds as they are" if factor == 1 else f"{factor:.1f} times the thresholds": tally
        for factor, tally in statistics.by_factor(groups).items()
    }
    shown = [query.bundle] if query.bundle else traffic.bundles
    fewest = min([texts[digest] for digest in shown if digest in texts] or texts.values())
    budgets = {
        f"a budget of {percent(budget)}": tally
        for budget, tally in statistics.by_budget(connection, scope).items()
        if min_calibration_size(budget) <= fewest
    }
    return Overview(
        traffic,
        plots.rate_plot(traffic.slots, width),
        plots.volume_plot(traffic.slots, width),
        [(group, plots.score_plot(group, highest)) for group in plotted],
        len(groups) - len(plotted),
        _choices(factors, traffic, statistics.FACTORS),
        _choices(budgets, traffic, [None] * len(budgets)),
        plots.confidence_plot(ranges),
        [(edge, *counts) for edge, counts in zip(statistics.CONFIDENCES, ranges, strict=True)],
    )


def _choices(
    tallies: Mapping[str, Tally], traffic: TrafficStatistics, tenths: Sequence[int | None]
) -> list[SliderChoice]:
    now = traffic.flagged
    choices = []
    for (name, tally), tenth in zip(tallies.items(), tenths, strict=True):
        more = tally.inputs - now.inputs
        change = (
            f"{number(abs(more))} {'more' if more > 0 else 'fewer'} than now" if more else "as now"
        )
        share = tally.inputs / traffic.inputs if traffic.inputs else 0.0
        summary = (
            f"At {name}: {number(tally.inputs)} of {number(traffic.inputs)} inputs flagged "
            f"({percent(share)}, {change}). Of those marked so far: "
            f"{tally.poisoned} of {now.poisoned} poisoned, "
            f"{tally.false_alarms} of {now.false_alarms} false alarms."
        )
        choices.append(SliderChoice(name, tally, share, summary, tenth))
    return choices
