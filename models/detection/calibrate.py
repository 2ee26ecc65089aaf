"""Calibration of both stages from clean texts alone: one threshold per predicted class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.detection.conformal import ThresholdGroup, conformal_threshold, min_calibration_size
from models.detection.screen import (
    FloatArray,
    Normalizer,
    Screen,
    ZScore,
    by_detector,
    features,
)
from models.errors import CalibrationError

MIN_CLASS_SIZE = 60
"""Texts that a class needs for a mean and a deviation of its own."""
HARMLESS_BUDGET = 0.0025
"""Tolerated share of harmless texts of other kinds that the override test calls triggered. They are
of four kinds; if all of the share falls on one of them, that is 1 % of it."""
MIN_SCALE = 1e-3
"""Floor for deviations; a class whose clean texts are all alike would have none."""


def calibrate(
    readings: FloatArray, checkpoints: int, frr_budget: float, *, by_class: bool = True
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
        checkpoints: K, the number of features from PSIM's checkpoints.
        frr_budget: tolerated share of rejected clean texts, in (0, 1).
        by_class: False pools all classes; the study compares that.

    Raises:
        CalibrationError: too few texts in all, or readings that are not finite.
    """
    _check(readings, frr_budget)
    classes = range(readings.shape[2])
    predicted, raw = features(readings, checkpoints)
    everyone, by_number = np.ones(len(predicted), np.bool_), [predicted == c for c in classes]
    peers = [
        members if by_class and members.sum() >= MIN_CLASS_SIZE else everyone
        for members in by_number
    ]
    each, standard = _standardize(raw, predicted, peers)
    together, components = _standardize(by_detector(standard, checkpoints), predicted, peers)
    scores = Normalizer.score(components)
    counts = np.bincount(predicted, minlength=len(classes)).tolist()
    pools = _pool(counts, min_calibration_size(frr_budget)) if by_class else [tuple(classes)]
    groups = [_group(pool, scores[np.isin(predicted, pool)], frr_budget) for pool in pools]
    return Screen(groups, Normalizer(each, together, checkpoints))


def _check(readings: FloatArray, frr_budget: float) -> None:
    if not np.isfinite(readings).all():
        raise CalibrationError("the victim gives NaN or infinite scores on the clean texts")
    _check_enough(len(readings), frr_budget)


def _check_enough(count: int, frr_budget: float) -> None:
    if count < (needed := min_calibration_size(frr_budget)):
        raise CalibrationError(
            f"{count} calibration texts are too few for a false-rejection budget of "
            f"{frr_budget}: it needs {needed}; give more clean texts or a larger --frr-budget"
        )


def _group(classes: tuple[int, ...], scores: FloatArray, frr_budget: float) -> ThresholdGroup:
    ascending = np.sort(scores)
    return ThresholdGroup(classes, conformal_threshold(ascending, frr_budget), ascending)


@dataclass(frozen=True)
class OverrideOutcomes:
    """Outcomes of override tests on texts without a trigger.

    The evidence of a text is that of `models.detection.override.evidence`, and 0 if it is not to be
    tested.
    """

    clean: FloatArray
    """Class and evidence of clean texts like those to come, shape (n, 2)."""
    harmless: FloatArray
    """The same of texts of other kinds, shape (m, 2)."""


def calibrate_override(
    outcomes: OverrideOutcomes, classes: int, frr_budget: float
) -> list[ThresholdGroup]:
    """Return the thresholds of the override test by predicted class, small classes pooled.

    A threshold keeps the budget on clean texts, and `HARMLESS_BUDGET` on texts of other kinds.
    Where there are too few of those for that, it lies above all of them.

    Raises:
        CalibrationError: too few clean texts, or scores that are not finite.
    """
    clean, harmless = outcomes.clean, outcomes.harmless
    if not (np.isfinite(clean).all() and np.isfinite(harmless).all()):
        raise CalibrationError("the override test gives NaN or infinite scores on the clean texts")
    _check_enough(len(clean), frr_budget)
    counts = np.bincount(clean[:, 0].astype(np.intp), minlength=classes).tolist()
    groups = []
    for pool in _pool(counts, min_calibration_size(frr_budget)):
        group = _group(pool, clean[np.isin(clean[:, 0], pool), 1], frr_budget)
        others = harmless[np.isin(harmless[:, 0], pool), 1]
        budget = max(HARMLESS_BUDGET, 1 / (len(others) + 1))
        least = conformal_threshold(others, budget) if len(others) else group.threshold
        groups.append(replace(group, threshold=max(group.threshold, least)))
    return groups


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
    checkpoints = own[0].normalizer.checkpoints
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
