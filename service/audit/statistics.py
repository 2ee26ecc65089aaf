"""Figures of the audit: added up by the database, since there may be millions of rows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from service.audit.rows import Mark
from service.audit.store import flagged, inputs

TENTHS = 30
"""Scores are counted by tenths of their threshold, up to three times it."""
FACTORS = range(5, 21)
"""Tenths of the thresholds that there are figures for."""
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)
"""Upper ends of ranges, as those of `psim_screen_confidence`."""


@dataclass(frozen=True, slots=True)
class StatisticsFilter:
    """Which inputs the figures are of: those of a time, and of a bundle unless it is None."""

    since: datetime
    until: datetime
    digest: str | None = None

    @property
    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """What SQL has to ask for."""
        found = [inputs.c.time >= self.since, inputs.c.time < self.until]
        return found if self.digest is None else [*found, inputs.c.digest == self.digest]


@dataclass(frozen=True, slots=True)
class Tally:
    """Inputs, and how many of them are marked."""

    inputs: int = 0
    poisoned: int = 0
    false_alarms: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.inputs + other.inputs,
            self.poisoned + other.poisoned,
            self.false_alarms + other.false_alarms,
        )


NONE = Tally()


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of the time."""

    start: datetime
    inputs: int
    flagged: int

    @property
    def rate(self) -> float | None:
        """The flagged share; None if there is nothing that could have been."""
        return self.flagged / self.inputs if self.inputs else None


@dataclass(frozen=True, slots=True)
class TrafficStatistics:
    """What came in and what became of it."""

    slots: Sequence[Slot]
    decisions: Counter[str]
    flagged: Tally
    unscreened: int
    bundles: Counter[str]
    """Inputs by digest, of all bundles whatever the scope."""

    @property
    def inputs(self) -> int:
        """All of them."""
        return sum(slot.inputs for slot in self.slots)


@dataclass(frozen=True, slots=True)
class ScoreGroup:
    """Inputs that were compared with one threshold: those of a bundle's predicted class."""

    digest: str
    threshold: float
    tenths: Sequence[Tally]
    """By score, in tenths of the threshold; the last one has all above."""

    @property
    def inputs(self) -> int:
        """All of them."""
        return sum(tally.inputs for tally in self.tenths)


def traffic(connection: sa.Connection, scope: StatisticsFilter, width_s: int) -> TrafficStatistics:
    """Count inputs by time, in slots of so many seconds, and by what became of them."""
    epoch = sa.extract("epoch", inputs.c.time)
    columns = [inputs.c[name] for name in ("digest", "decision", "poisoned", "mark")]
    slot = (epoch - epoch % width_s).label("slot")
    everything = StatisticsFilter(scope.since, scope.until)
    query = sa.select(slot, *columns, sa.func.count()).where(*everything.conditions)
    rows = connection.execute(query.group_by("slot", *columns)).all()
    bundles: Counter[str] = Counter()
    inputs_by: Counter[int] = Counter()
    flagged_by: Counter[int] = Counter()
    decisions: Counter[str] = Counter()
    found, unscreened = NONE, 0
    for start, digest, decision, poisoned, mark, count in rows:
        bundles[digest] += count
        if scope.digest not in (None, digest):
            continue
        inputs_by[int(start)] += count
        decisions[decision or "none"] += count
        if poisoned:
            flagged_by[int(start)] += count
            found += _tally(mark, count)
        elif poisoned is None:
            unscreened += count
    first = int(scope.since.timestamp()) // width_s * width_s
    starts = range(first, int(scope.until.timestamp()) + 1, width_s)
    slots = [
        Slot(datetime.fromtimestamp(start, UTC), inputs_by[start], flagged_by[start])
        for start in starts
    ]
    return TrafficStatistics(slots, decisions, found, unscreened, bundles)


def groups(connection: sa.Connection, scope: StatisticsFilter) -> list[ScoreGroup]:
    """Count inputs by threshold and score; the threshold with most of them comes first."""
    score, threshold = inputs.c.score, inputs.c.threshold
    under = [(score < threshold * ((i + 1) / 10), i) for i in range(TENTHS)]
    tenth = sa.case(*under, else_=TENTHS).label("tenth")
    query = sa.select(inputs.c.digest, threshold, tenth, inputs.c.mark, sa.func.count())
    query = query.where(score.is_not(None), *scope.conditions)
    rows = connection.execute(query.group_by(inputs.c.digest, threshold, "tenth", inputs.c.mark))
    found: dict[tuple[str, float], list[Tally]] = {}
    for digest, limit, number, mark, count in rows:
        tenths = found.setdefault((digest, limit), [NONE] * (TENTHS + 1))
        tenths[number] += _tally(mark, count)
    made = [ScoreGroup(digest, limit, tenths) for (digest, limit), tenths in found.items()]
    return sorted(made, key=lambda group: (-group.inputs, group.digest, group.threshold))


def by_factor(found: Iterable[ScoreGroup]) -> dict[float, Tally]:
    """Return what would be flagged at so many times the thresholds."""
    tenths = [group.tenths for group in found]
    return {
        factor / 10: sum((t for own in tenths for t in own[factor:]), NONE) for factor in FACTORS
    }


def by_budget(connection: sa.Connection, scope: StatisticsFilter) -> dict[float, Tally]:
    """Return what would be flagged at another false-rejection budget.

    The rule `p_value <= budget` is the threshold's, see
    `models.detection.conformal.conformal_threshold`.
    """
    within = [sa.func.count().filter(inputs.c.p_value <= budget) for budget in BUDGETS]
    query = sa.select(inputs.c.mark, *within).where(*scope.conditions).group_by(inputs.c.mark)
    rows = connection.execute(query).all()
    return {
        budget: sum((_tally(row[0], row[number]) for row in rows), NONE)
        for number, budget in enumerate(BUDGETS, 1)
    }


def confidences(connection: sa.Connection, scope: StatisticsFilter) -> list[tuple[int, int]]:
    """Count inputs that passed and that were flagged, by range of `CONFIDENCES`."""
    confidence = inputs.c.confidence
    upto = [(confidence <= edge, number) for number, edge in enumerate(CONFIDENCES[:-1])]
    # Not a name that the table has: it would be grouped by that.
    within = sa.case(*upto, else_=len(CONFIDENCES) - 1).label("within")
    query = sa.select(within, sa.func.count(), sa.func.count().filter(flagged))
    query = query.where(confidence.is_not(None), *scope.conditions).group_by("within")
    found = {row[0]: (row[1] - row[2], row[2]) for row in connection.execute(query)}
    return [found.get(number, (0, 0)) for number in range(len(CONFIDENCES))]


def _tally(mark: str | None, count: int) -> Tally:
    poisoned = count if mark == Mark.POISONED else 0
    return Tally(count, poisoned, count if mark == Mark.FALSE_ALARM else 0)
