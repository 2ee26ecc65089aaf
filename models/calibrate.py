"""A screen from clean texts alone: one threshold per predicted class, for a rejection budget."""

import numpy as np

from models.errors import CalibrationError
from models.screen import (
    FloatArray,
    Group,
    Norm,
    Screen,
    conformal_threshold,
    min_calibration_size,
    voices,
)

LEAST_FOR_NORM = 30
"""Texts that a class needs for a mean and a standard deviation of its own."""
LEAST_SCALE = 1e-3
"""Classes whose clean texts are all alike would have none."""


def calibrate(
    readings: FloatArray, checkpoints: int, frr_budget: float, *, by_class: bool = True
) -> Screen:
    """Return a screen with a threshold per predicted class, small classes pooled.

    Class-conditional split conformal prediction (see `models.screen`): if the clean texts to come
    are exchangeable with these, the expected false rejection rate of each group is within the
    budget, and so is the total. Classes with too few texts for a threshold of their own share one,
    together with the smallest of the other classes if they are still too few. Mean and standard
    deviation come from the same texts, which favours those over the texts to come by no more than
    one text in n does.

    Args:
        readings: what `Guarded.screen` gives of clean texts that it was not fitted on, shape
            (n, V, C).
        checkpoints: how many of the V voices are PSIM's.
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
    norm = _norm(readings, checkpoints, by_class)
    predicted, by_voice = norm.scores(readings)
    scores, classes = by_voice.max(1), range(readings.shape[2])
    counts = np.bincount(predicted, minlength=len(classes))
    groups = []
    for own in _pool(counts.tolist(), needed) if by_class else [tuple(classes)]:
        of_group = np.sort(scores[np.isin(predicted, own)])
        groups.append(Group(own, conformal_threshold(of_group, frr_budget), of_group))
    return Screen(groups, norm)


def _norm(readings: FloatArray, checkpoints: int, by_class: bool) -> Norm:
    """Return mean and standard deviation by class; those of all texts where a class has few."""
    predicted, raw = voices(readings, checkpoints)
    own = [raw[predicted == c] for c in range(readings.shape[2])]
    own = [texts if by_class and len(texts) >= LEAST_FOR_NORM else raw for texts in own]
    return Norm(
        np.stack([texts.mean(0) for texts in own]),
        np.maximum(np.stack([texts.std(0) for texts in own]), LEAST_SCALE),
        checkpoints,
    )


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that every part has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])
