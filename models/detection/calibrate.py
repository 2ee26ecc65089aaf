"""Calibration of both stages from clean texts alone: one threshold per predicted class.

With several views, the budget is divided by their number (Bonferroni). Then it holds for a text as
a whole, whatever the views have to do with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.detection.conformal import ThresholdGroup, conformal_threshold, min_calibration_size
from models.detection.override import KEEPS, OverrideGroup, evidence, lost_below, odds_above
from models.detection.screen import (
    FloatArray,
    Layout,
    Normalizer,
    Screen,
    ZScore,
    by_detector,
    features,
)
from models.detection.views import Views
from models.errors import CalibrationError

MIN_CLASS_SIZE = 60
"""Texts that a class needs for a mean and a deviation of its own."""
KEPT_BUDGET = 0.02
"""Tolerated share of harmless texts of other kinds that are to be tested and keep their class. A
trigger that outlived clean tuning just so keeps less of it than one half, and where such texts keep
next to nothing, less is telling."""
HARMLESS_BUDGET = 0.0025
"""Tolerated share of harmless texts of other kinds that the override test calls triggered. They are
of four kinds; if all of the share falls on one of them, that is 1 % of it."""
CLEARLY = 1.0
"""Log-odds above those that keep a class, from which what a text keeps may count by itself."""
MIN_SCALE = 1e-3
"""Floor for deviations; a class whose clean texts are all alike would have none."""


def calibrate(
    readings: FloatArray,
    layout: Layout,
    frr_budget: float,
    *,
    views: Views = (),
    by_class: bool = True,
) -> Screen:
    """Return a screen with a threshold per predicted class, small classes pooled.

    Class-conditional split conformal prediction (see `models.detection.conformal`): if future clean
    texts are exchangeable with these, the expected false rejection rate of each group is within
    the budget, and so is the total. Classes with too few texts for a threshold of their own share
    one, together with the smallest of the other classes if they are still too few. Mean and
    deviation come from the same texts, so each text is scored as if it had not been among them.

    Args:
        readings: output of `Guarded.screen` for clean texts that it was not fitted on, shape
            (n, V, C).
        layout: which readings are whose.
        frr_budget: tolerated share of rejected clean texts, in (0, 1).
        views: classes that exclude each other; one view of all classes by default.
        by_class: False pools all classes of a view; the study compares that.

    Raises:
        CalibrationError: too few texts in all, or readings that are not finite.
    """
    views = views or [range(readings.shape[2])]
    if not np.isfinite(readings).all():
        raise CalibrationError("the victim gives NaN or infinite scores on the clean texts")
    _check_enough(len(readings), frr_budget, len(views))
    share = frr_budget / len(views)
    parts = [_calibrate_view(readings, view, layout, share, by_class) for view in views]
    statistics = Normalizer(
        _joined([each for _, each, _ in parts]),
        _joined([together for _, _, together in parts]),
        layout,
    )
    return Screen([group for groups, _, _ in parts for group in groups], statistics, views)


def _calibrate_view(
    readings: FloatArray, view: range, layout: Layout, frr_budget: float, by_class: bool
) -> tuple[list[ThresholdGroup], ZScore, ZScore]:
    """Return the thresholds of a view, and the statistics of its features and components."""
    classes, (predicted, raw) = range(len(view)), features(readings, layout.checkpoints, view)
    predicted = predicted - view.start
    everyone, by_number = np.ones(len(predicted), np.bool_), [predicted == c for c in classes]
    peers = [
        members if by_class and members.sum() >= MIN_CLASS_SIZE else everyone
        for members in by_number
    ]
    each, standard = _standardize(raw, predicted, peers)
    together, components = _standardize(by_detector(standard, layout), predicted, peers)
    scores = Normalizer.score(components)
    counts = np.bincount(predicted, minlength=len(classes)).tolist()
    pools = _pool(counts, min_calibration_size(frr_budget)) if by_class else [tuple(classes)]
    groups = [
        _group(_numbered(pool, view), scores[np.isin(predicted, pool)], frr_budget)
        for pool in pools
    ]
    return groups, each, together


def _joined(parts: Sequence[ZScore]) -> ZScore:
    """Return the statistics of all views, class by class."""
    return ZScore(
        np.concatenate([one.centre for one in parts]), np.concatenate([one.scale for one in parts])
    )


def _numbered(pool: tuple[int, ...], view: range) -> tuple[int, ...]:
    """Return the numbers of the pooled classes of a view among those of all views."""
    return tuple(view[c] for c in pool)


def _check_enough(count: int, frr_budget: float, views: int) -> None:
    if count < (needed := min_calibration_size(frr_budget / views)):
        shared = f", shared by {views} labels" if views > 1 else ""
        raise CalibrationError(
            f"{count} calibration texts are too few for a false-rejection budget of {frr_budget}"
            f"{shared}: it needs {needed}; give more clean texts or a larger --frr-budget"
        )


def _group(classes: tuple[int, ...], scores: FloatArray, frr_budget: float) -> ThresholdGroup:
    ascending = np.sort(scores)
    return ThresholdGroup(classes, conformal_threshold(ascending, frr_budget), ascending)


@dataclass(frozen=True)
class OverrideOutcomes:
    """Outcomes of override tests on texts without a trigger.

    A row is a class, the evidence of the first stage (`first_stage_evidence`), and the kept
    probability: 0 if the text is not to be tested.
    """

    clean: FloatArray
    """Of clean texts like those to come, shape (n, 3)."""
    harmless: FloatArray
    """Of texts of other kinds, shape (m, 3)."""


def calibrate_override(
    outcomes: OverrideOutcomes, views: Views, frr_budget: float, *, thorough: bool = False
) -> list[OverrideGroup]:
    """Return the thresholds of the override test by predicted class.

    A threshold keeps the budget on clean texts, which small classes borrow from others. It also
    keeps `HARMLESS_BUDGET` on texts of other kinds, class by class. Where there are too few of
    those, it lies above them all.

    Where texts are tested that the first stage does not suspect, its score says little of them. So
    there, what they keep counts by itself too: as many times as harmless texts leave room for.

    Args:
        outcomes: of texts in all of these views.
        views: those that the test looks at.
        frr_budget: tolerated share of clean texts that are triggered, in (0, 1).
        thorough: whether the thresholds are of texts that the first stage does not suspect.

    Raises:
        CalibrationError: too few clean texts in a view, or scores that are not finite.
    """
    clean, harmless = outcomes.clean, outcomes.harmless
    if not (np.isfinite(clean).all() and np.isfinite(harmless).all()):
        raise CalibrationError("the override test gives NaN or infinite scores on the clean texts")
    share = frr_budget / len(views)
    groups = []
    for view in views:
        counts = [int((clean[:, 0] == c).sum()) for c in view]
        _check_enough(sum(counts), frr_budget, len(views))
        for local in _pool(counts, min_calibration_size(share)):
            pool = _numbered(local, view)
            groups += _by_class(pool, outcomes, share, views, thorough=thorough)
    return groups


def _by_class(
    pool: tuple[int, ...],
    outcomes: OverrideOutcomes,
    share: float,
    views: Views,
    *,
    thorough: bool,
) -> list[OverrideGroup]:
    """Return a group for each class of a pool, whose small classes borrow the clean texts of all.

    A class with enough texts borrows none, or a small one that overrides by nature would put its
    threshold out of reach: a label that is on stays on beside any other text. Harmless texts are
    made, and so there are enough of them for each class.
    """
    spared, lost = HARMLESS_BUDGET / len(views), lost_below(views)
    clean, harmless = (
        {c: rows[rows[:, 0] == c, 1:] for c in pool} for rows in (outcomes.clean, outcomes.harmless)
    )
    keeps = {c: _keeps(harmless[c][:, 1], lost) for c in pool}
    alone = {c: _alone(harmless[c], keeps[c], spared) if thorough else 1.0 for c in pool}

    def evidence_of(rows: FloatArray, c: int) -> FloatArray:
        return evidence(rows[:, 0], rows[:, 1], keeps[c], alone[c]).astype(np.float32)

    clean_of = {c: evidence_of(clean[c], c) for c in pool}
    groups = []
    for c, own in clean_of.items():
        enough = len(own) >= min_calibration_size(share)
        scores = own if enough else np.concatenate([*clean_of.values()])
        shared = _group((c,), scores, share)
        threshold = _least_above(evidence_of(harmless[c], c), spared, shared.threshold)
        threshold = max(shared.threshold, threshold)
        groups.append(OverrideGroup((c,), threshold, shared.scores, keeps[c], alone[c]))
    return groups


def _alone(harmless: FloatArray, keeps: float, spared: float) -> float:
    """Return how many times what texts keep counts by itself, given harmless ones, (m, 2).

    So many times that the harmless texts which keep most are as much evidence as those for which
    both stages speak most. But what counts as much must lie `CLEARLY` above what harmless texts
    keep: no text is triggered by a hair's breadth.
    """
    both = evidence(harmless[:, 0], harmless[:, 1], keeps)
    odds = np.maximum(odds_above(harmless[:, 1].astype(np.float64), keeps), 0)
    highest = [_least_above(own.astype(np.float32), spared, 0.0) for own in (both, odds)]
    return max(1.0, highest[0] / max(highest[1], CLEARLY))


def _keeps(kept: FloatArray, lost: float) -> float:
    """Return the probability from which a text keeps its class, by those of harmless texts."""
    return min(max(_least_above(kept, KEPT_BUDGET, KEEPS), lost), KEEPS)


def _least_above(scores: FloatArray, budget: float, default: float) -> float:
    """Return the threshold that keeps a budget, or lies above all of too few scores."""
    if not len(scores):
        return default
    return conformal_threshold(scores, max(budget, 1 / (len(scores) + 1)))


@dataclass(frozen=True)
class Parity:
    """Comparison of an engine with the reference on the same clean texts."""

    decisions_agree: float
    """Share of the texts that both call poisoned, or neither, each by its own thresholds."""
    largest_difference: float
    """Between two probabilities."""


Calibrated = tuple[Screen, FloatArray]
"""A screen, and the readings that it was calibrated with, shape (n, V, C)."""


def parity(reference: Calibrated, own: Calibrated) -> Parity:
    """Compare an engine with the reference, on readings of the same texts."""
    agree = reference[0].flags(reference[1]) == own[0].flags(own[1])
    checkpoints = own[0].normalizer.layout.checkpoints
    difference = np.abs(reference[1] - own[1])[:, :checkpoints].max()
    return Parity(float(agree.mean()), float(difference))


def _standardize(
    raw: NDArray[np.float64], predicted: NDArray[np.intp], peers: Sequence[NDArray[np.bool_]]
) -> tuple[ZScore, NDArray[np.float64]]:
    """Return the z-score fitted on texts, and the z-score of each by the others, shape (n, N).

    A feature of clean texts can have a long upper tail, which would set the threshold for features
    that have none. So the deviation is that of the upper tail: it comes from the fourth moment
    above the mean, and equals the usual one if the feature is Gaussian.

    A text pulls mean and deviation towards itself, so it would look less extreme than a new one
    just like it. Without it the mean lies n / (n - 1) times as far from it; the deviation is taken
    around the old mean. Values below the mean stay as they are.

    Args:
        raw: shape (n, N).
        predicted: classes, shape (n,).
        peers: for each class, the texts that it is standardized by, shape (n,) each.
    """
    centre = np.stack([raw[own].mean(0) for own in peers])
    fourth = np.stack([_above(raw[o] - c).mean(0) for o, c in zip(peers, centre, strict=True)])
    z_score = ZScore(centre, np.maximum(fourth**0.25, MIN_SCALE))
    n = np.array([max(own.sum(), 2) for own in peers])[predicted, None]
    away = raw - centre[predicted]
    others = np.maximum(n * fourth[predicted] - _above(away), 0) / (n - 1)
    left_out = n / (n - 1) * away / np.maximum(others**0.25, MIN_SCALE)
    return z_score, np.maximum(z_score(predicted, raw), left_out)


def _above(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scaled fourth powers of positive parts; for Gaussians sigma ** 4 on average."""
    powers: NDArray[np.float64] = np.maximum(deviations, 0) ** 4 / 1.5
    return powers


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that each group has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])
