"""A screen from clean texts alone: one threshold per predicted class, for a rejection budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.detection.screen import (
    FloatArray,
    Normalizer,
    Screen,
    ThresholdGroup,
    ZScore,
    conformal_threshold,
    features,
    min_calibration_size,
    pool_checkpoints,
)
from models.errors import CalibrationError

LEAST_FOR_NORM = 60
"""Texts that a class needs for a centre and a spread of its own."""
LEAST_SCALE = 1e-3
"""Classes whose clean texts are all alike would have none."""


def calibrate(
    readings: FloatArray, checkpoints: int, frr_budget: float, *, by_class: bool = True
) -> Screen:
    """Return a screen with a threshold per predicted class, small classes pooled.

    Class-conditional split conformal prediction (see `models.detection.screen`): if the clean texts
    to come are exchangeable with these, the expected false rejection rate of each group is within
    the budget, and so is the total. Classes with too few texts for a threshold of their own share
    one, together with the smallest of the other classes if they are still too few. Mean and spread
    come from the same texts, so each text is scored as if it had not been among them.

    Args:
        readings: what `Guarded.screen` gives of clean texts that it was not fitted on, shape
            (n, V, C).
        checkpoints: how many of the V features are PSIM's.
        frr_budget: tolerated share of rejected clean texts, in (0, 1).
        by_class: False compares texts of all classes, for comparison.

    Raises:
        CalibrationError: too few texts in all, or readings that are not finite.
    """
    if not np.isfinite(readings).all():
        raise CalibrationError("the victim gives NaN or infinite scores on the clean texts")
    needed = min_calibration_size(frr_budget)
    if len(readings) < needed:
        raise CalibrationError(
            f"{len(readings)} calibration texts are too few for a false-rejection budget of "
            f"{frr_budget}: it needs {needed}; give more clean texts or a larger --frr-budget"
        )
    classes = range(readings.shape[2])
    predicted, raw = features(readings, checkpoints)
    every, own = np.ones(len(predicted), np.bool_), [predicted == c for c in classes]
    alike = [o if by_class and o.sum() >= LEAST_FOR_NORM else every for o in own]
    each, standard = _measured(raw, predicted, alike)
    together, components = _measured(pool_checkpoints(standard, checkpoints), predicted, alike)
    scores = Normalizer.score(components)
    counts = np.bincount(predicted, minlength=len(classes))
    groups = []
    for members in _pool(counts.tolist(), needed) if by_class else [tuple(classes)]:
        of_group = np.sort(scores[np.isin(predicted, members)])
        groups.append(ThresholdGroup(members, conformal_threshold(of_group, frr_budget), of_group))
    return Screen(groups, Normalizer(each, together, checkpoints))


@dataclass(frozen=True)
class Parity:
    """How what one engine says of some clean texts compares with what the reference says."""

    decisions_agree: float
    """Share of the texts that both call poisoned, or neither, each by its own thresholds."""
    largest_difference: float
    """Of a probability."""


Calibrated = tuple[Screen, FloatArray]
"""A screen, and the readings that it was calibrated by, shape (n, V, C)."""


def parity(reference: Calibrated, own: Calibrated) -> Parity:
    """Compare an engine with the reference, on readings of the same texts."""

    agree = reference[0].flags(reference[1]) == own[0].flags(own[1])
    checkpoints = own[0].normalizer.checkpoints
    difference = np.abs(reference[1] - own[1])[:, :checkpoints].max()
    return Parity(float(agree.mean()), float(difference))


def _measured(
    raw: NDArray[np.float64], predicted: NDArray[np.intp], alike: Sequence[NDArray[np.bool_]]
) -> tuple[ZScore, NDArray[np.float64]]:
    """Return the measure that texts give, and what each is by that of the others, shape (n, N).

    A feature of clean texts can have a long upper tail, which would set the threshold for features
    that have none. So the deviation is that of the upper tail: by the fourth moment above the mean,
    and the usual one if the feature is Gaussian.

    A text pulls mean and deviation towards itself, so it would look less extreme than a new one
    just like it. Without it the mean lies n / (n - 1) times as far from it; the deviation is taken
    around the old mean. What is under the mean is left as it is.

    Args:
        raw: shape (n, N).
        predicted: classes, shape (n,).
        alike: the texts that each class is measured by, shape (n,) each.
    """
    centre = np.stack([raw[own].mean(0) for own in alike])
    fourth = np.stack([_above(raw[o] - c).mean(0) for o, c in zip(alike, centre, strict=True)])
    measure = ZScore(centre, np.maximum(fourth**0.25, LEAST_SCALE))
    n = np.array([max(own.sum(), 2) for own in alike])[predicted, None]
    away = raw - centre[predicted]
    others = np.maximum(n * fourth[predicted] - _above(away), 0) / (n - 1)
    left_out = n / (n - 1) * away / np.maximum(others**0.25, LEAST_SCALE)
    return measure, np.maximum(measure(predicted, raw), left_out)


def _above(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return fourth powers of what is above zero; of Gaussians, sigma ** 4 on average."""
    powers: NDArray[np.float64] = np.maximum(deviations, 0) ** 4 / 1.5
    return powers


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that every part has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])
