"""Statistics of the audit, computed by the database: there may be millions of rows.

Numbers of inputs are estimates where inputs were sampled: a row that was kept at a rate counts as
`1 / rate` inputs (Horvitz and Thompson), so each number is right on average. They are exact for
findings and marks, since what is found is always kept.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from models.detection.screen import Finding
from service.audit.rows import Mark
from service.audit.store import flagged, inputs

TENTHS = 30
"""Bins of the score histograms, each a tenth of the threshold wide; one more has the rest."""
FACTORS = range(5, 21)
"""Alternative thresholds, in tenths of the present ones."""
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)
"""Upper ends of the ranges, as in `psim_screen_confidence`."""
ESTIMATE = sa.func.sum(1 / inputs.c.sample_rate)
"""Number of inputs for which some rows stand; NULL for none."""


@dataclass(frozen=True, slots=True)
class StatisticsFilter:
    """Inputs of a period, and of one bundle or, if that is None, of all."""

    since: datetime
    until: datetime
    digest: str | None = None

    @property
    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The filter in SQL."""
        period = [inputs.c.time >= self.since, inputs.c.time < self.until]
        return period if self.digest is None else [*period, inputs.c.digest == self.digest]


@dataclass(frozen=True, slots=True)
class Tally:
    """A number of inputs, and how many of them are marked."""

    inputs: float = 0
    poisoned: float = 0
    false_alarms: float = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.inputs + other.inputs,
            self.poisoned + other.poisoned,
            self.false_alarms + other.false_alarms,
        )


NONE = Tally()


@dataclass(frozen=True, slots=True)
class Slot:
    """Inputs of a time slot."""

    start: datetime
    inputs: float
    triggered: float
    unfamiliar: float

    @property
    def flagged(self) -> float:
        """Inputs with a finding."""
        return self.triggered + self.unfamiliar

    @property
    def rate(self) -> float | None:
        """The flagged share; None without inputs."""
        return self.flagged / self.inputs if self.inputs else None


@dataclass(frozen=True, slots=True)
class TrafficStatistics:
    """Inputs, and the decisions about them."""

    slots: Sequence[Slot]
    decisions: Mapping[str, float]
    """Inputs by decision, the most frequent one first."""
    triggered: Tally
    unfamiliar: Tally
    unscreened: float
    bundles: Mapping[str, float]
    """Inputs by digest, of all bundles whatever the filter, the most frequent one first."""
    rows: int
    """Rows from which all this is estimated; as many as inputs if none were left out."""

    @property
    def inputs(self) -> float:
        """Number of all inputs."""
        return sum(slot.inputs for slot in self.slots)

    @property
    def flagged(self) -> Tally:
        """Inputs with a finding."""
        return self.triggered + self.unfamiliar


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the screen: the columns of its score and of its threshold."""

    score: sa.Column[float]
    threshold: sa.Column[float]


EXTREME = Stage(inputs.c.score, inputs.c.threshold)
OVERRIDE = Stage(inputs.c.override, inputs.c.override_threshold)
"""Asked about few inputs; the others have no such score."""


@dataclass(frozen=True, slots=True)
class ScoreGroup:
    """Inputs with one threshold, that of a predicted class (or several) of a bundle."""

    digest: str
    threshold: float
    tenths: Sequence[Tally]
    """Histogram of scores, in bins of a tenth of the threshold; the last bin has the rest."""

    @property
    def inputs(self) -> float:
        """Number of all inputs."""
        return sum(tally.inputs for tally in self.tenths)


def traffic(connection: sa.Connection, scope: StatisticsFilter, width_s: int) -> TrafficStatistics:
    """Count inputs by decision, and by time in slots of `width_s` seconds."""
    epoch = sa.extract("epoch", inputs.c.time)
    columns = [inputs.c[name] for name in ("digest", "decision", "poisoned", "finding", "mark")]
    slot = (epoch - epoch % width_s).label("slot")
    all_bundles = StatisticsFilter(scope.since, scope.until)
    query = sa.select(slot, *columns, ESTIMATE, sa.func.count()).where(*all_bundles.conditions)
    groups = connection.execute(query.group_by("slot", *columns)).all()
    bundles: defaultdict[str, float] = defaultdict(float)
    inputs_by: defaultdict[int, float] = defaultdict(float)
    found_by: defaultdict[tuple[int, str], float] = defaultdict(float)
    decisions: defaultdict[str, float] = defaultdict(float)
    tallies, unscreened, rows = dict.fromkeys(Finding, NONE), 0.0, 0
    for start, digest, decision, poisoned, finding, mark, count, kept in groups:
        bundles[digest] += count
        if scope.digest not in (None, digest):
            continue
        rows += kept
        inputs_by[int(start)] += count
        decisions[decision or "none"] += count
        if poisoned or finding:
            found = Finding(finding or Finding.TRIGGERED)
            found_by[int(start), found] += count
            tallies[found] += _tally(mark, count)
        elif poisoned is None:
            unscreened += count
    return TrafficStatistics(
        _slots(scope, width_s, inputs_by, found_by),
        _most_first(decisions),
        tallies[Finding.TRIGGERED],
        tallies[Finding.UNFAMILIAR],
        unscreened,
        _most_first(bundles),
        rows,
    )


def _slots(
    scope: StatisticsFilter,
    width_s: int,
    inputs_by: Mapping[int, float],
    found_by: Mapping[tuple[int, str], float],
) -> list[Slot]:
    """Return all slots of a period, those without inputs too."""
    first = int(scope.since.timestamp()) // width_s * width_s
    return [
        Slot(
            datetime.fromtimestamp(start, UTC),
            inputs_by.get(start, 0.0),
            found_by.get((start, Finding.TRIGGERED), 0.0),
            found_by.get((start, Finding.UNFAMILIAR), 0.0),
        )
        for start in range(first, int(scope.until.timestamp()) + 1, width_s)
    ]


def _most_first(counts: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(counts.items(), key=lambda one: -one[1]))


def groups(
    connection: sa.Connection, scope: StatisticsFilter, stage: Stage = EXTREME
) -> list[ScoreGroup]:
    """Count inputs by threshold and score; the threshold with most inputs comes first."""
    score, threshold = stage.score, stage.threshold
    under = [(score < threshold * ((i + 1) / 10), i) for i in range(TENTHS)]
    tenth = sa.case(*under, else_=TENTHS).label("tenth")
    query = sa.select(inputs.c.digest, threshold, tenth, inputs.c.mark, ESTIMATE)
    query = query.where(score.is_not(None), *scope.conditions)
    rows = connection.execute(query.group_by(inputs.c.digest, threshold, "tenth", inputs.c.mark))
    histograms: dict[tuple[str, float], list[Tally]] = {}
    for digest, limit, number, mark, count in rows:
        tenths = histograms.setdefault((digest, limit), [NONE] * (TENTHS + 1))
        tenths[number] += _tally(mark, count)
    found = [ScoreGroup(digest, limit, tenths) for (digest, limit), tenths in histograms.items()]
    return sorted(found, key=lambda group: (-group.inputs, group.digest, group.threshold))


def by_factor(groups: Iterable[ScoreGroup]) -> dict[float, Tally]:
    """Return the inputs at or above their thresholds, if these were multiplied by a factor."""
    histograms = [group.tenths for group in groups]
    return {
        factor / 10: sum((tally for tenths in histograms for tally in tenths[factor:]), NONE)
        for factor in FACTORS
    }


def by_budget(connection: sa.Connection, scope: StatisticsFilter) -> dict[float, Tally]:
    """Return the inputs that would be flagged at other false-rejection budgets.

    `p_value <= budget` is equivalent to the rule by the threshold, see
    `models.detection.conformal.conformal_threshold`.
    """
    within = [_estimate(inputs.c.p_value <= budget) for budget in BUDGETS]
    query = sa.select(inputs.c.mark, *within).where(*scope.conditions).group_by(inputs.c.mark)
    rows = connection.execute(query).all()
    return {
        budget: sum((_tally(row[0], row[number]) for row in rows), NONE)
        for number, budget in enumerate(BUDGETS, 1)
    }


def confidences(connection: sa.Connection, scope: StatisticsFilter) -> list[tuple[float, float]]:
    """Count passed and flagged inputs, by range of `CONFIDENCES`."""
    confidence = inputs.c.confidence
    upto = [(confidence <= edge, number) for number, edge in enumerate(CONFIDENCES[:-1])]
    # Not the name of a column: SQL would group by that column.
    within = sa.case(*upto, else_=len(CONFIDENCES) - 1).label("within")
    query = sa.select(within, ESTIMATE, _estimate(flagged))
    query = query.where(confidence.is_not(None), *scope.conditions).group_by("within")
    counts = {row[0]: (row[1] - row[2], row[2]) for row in connection.execute(query)}
    return [counts.get(number, (0, 0)) for number in range(len(CONFIDENCES))]


def _estimate(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[float]:
    """Estimate how many inputs meet a condition."""
    return sa.func.coalesce(ESTIMATE.filter(condition), 0)


def _tally(mark: str | None, count: float) -> Tally:
    poisoned = count if mark == Mark.POISONED else 0
    return Tally(count, poisoned, count if mark == Mark.FALSE_ALARM else 0)
