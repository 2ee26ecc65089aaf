"""Statistics and plots of the first page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from models.detection.conformal import min_calibration_size
from service.audit import statistics
from service.audit.statistics import NONE, ScoreGroup, Tally, TrafficStatistics
from service.console import plots
from service.console.formatting import count, percent
from service.console.plots import Plot
from service.console.query import PERIODS, ConsoleQuery

GROUPS = 12
"""Most plots of scores; the thresholds with fewest inputs have none."""


@dataclass(frozen=True, slots=True)
class SliderChoice:
    """A position of a slider: the inputs that would be found."""

    name: str
    tally: Tally
    share: float
    summary: str
    tenth: int | None = None
    """Tenths of the thresholds, if the slider is about them."""


@dataclass(frozen=True, slots=True)
class StagePlots:
    """Scores of a stage of the screen, against their thresholds."""

    groups: Sequence[tuple[ScoreGroup, Plot]]
    without_plot: int
    """Thresholds that have no plot."""
    choices: Sequence[SliderChoice]
    """What other thresholds would find."""


@dataclass(frozen=True, slots=True)
class Overview:
    """Statistics and plots."""

    traffic: TrafficStatistics
    rate: Plot
    volume: Plot
    scores: StagePlots
    overrides: StagePlots
    budgets: Sequence[SliderChoice]
    confidence: Plot
    confidences: Sequence[tuple[float, float, float]]
    """Upper end of a range, inputs that passed, inputs that were flagged."""


def overview(
    connection: sa.Connection, query: ConsoleQuery, now: datetime, texts: Mapping[str, int]
) -> Overview:
    """Compute the overview from the audit.

    Args:
        connection: to the audit.
        query: which inputs.
        now: end of the period.
        texts: size of the smallest calibration group over the number of views, by digest of a
            served bundle. Budgets that need more texts than the bundles of these inputs have are
            left out.
    """
    scope, (_, _, width) = query.scope(now), PERIODS[query.period]
    traffic = statistics.traffic(connection, scope, int(width.total_seconds()))
    scores = statistics.groups(connection, scope)
    overrides = statistics.groups(connection, scope, statistics.OVERRIDE)
    asked = sum((tally for group in overrides for tally in group.tenths), NONE)
    ranges = statistics.confidences(connection, scope)
    flagged = _WhatIf("inputs flagged", traffic.inputs, traffic.flagged, traffic.flagged)
    confirmed = sum((tally for group in overrides for tally in group.tenths[10:]), NONE)
    triggered = _WhatIf("asked inputs triggered", asked.inputs, confirmed, asked)
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
        _stage_plots(scores, flagged),
        _stage_plots(overrides, triggered),
        _choices(budgets, flagged, [None] * len(budgets)),
        plots.confidence_plot(ranges),
        [(edge, *counts) for edge, counts in zip(statistics.CONFIDENCES, ranges, strict=True)],
    )


@dataclass(frozen=True, slots=True)
class _WhatIf:
    """What the choices of a slider are compared with."""

    what: str
    total: float
    now: Tally
    """What is found now."""
    marked: Tally
    """Inputs that may have marks."""


def _stage_plots(groups: Sequence[ScoreGroup], what_if: _WhatIf) -> StagePlots:
    plotted = groups[:GROUPS]
    highest = max((tally.inputs for group in plotted for tally in group.tenths), default=0)
    factors = {
        "the thresholds as they are" if factor == 1 else f"{factor:.1f} times the thresholds": tally
        for factor, tally in statistics.by_factor(groups).items()
    }
    return StagePlots(
        [(group, plots.score_plot(group, highest)) for group in plotted],
        len(groups) - len(plotted),
        _choices(factors, what_if, statistics.FACTORS),
    )


def _choices(
    tallies: Mapping[str, Tally], what_if: _WhatIf, tenths: Sequence[int | None]
) -> list[SliderChoice]:
    total, marked = what_if.total, what_if.marked
    choices = []
    for (name, tally), tenth in zip(tallies.items(), tenths, strict=True):
        more = round(tally.inputs - what_if.now.inputs)
        change = (
            f"{count(abs(more))} {'more' if more > 0 else 'fewer'} than now" if more else "as now"
        )
        share = tally.inputs / total if total else 0.0
        summary = (
            f"At {name}: {count(tally.inputs)} of {count(total)} {what_if.what} "
            f"({percent(share)}, {change}). Of those marked so far: "
            f"{count(tally.poisoned)} of {count(marked.poisoned)} poisoned, "
            f"{count(tally.false_alarms)} of {count(marked.false_alarms)} false alarms."
        )
        choices.append(SliderChoice(name, tally, share, summary, tenth))
    return choices
