"""A screen from clean texts alone: one threshold per predicted class, for a rejection budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    deviation come from the same texts, so each text is scored as if it had not been among them.

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
    classes = range(readings.shape[2])
    predicted, raw = voices(readings, checkpoints)
    texts = [raw[predicted == c] if by_class else raw for c in classes]
    behind = [own if len(own) >= LEAST_FOR_NORM else raw for own in texts]
    norm = _norm(behind, checkpoints)
    scores = _left_out(norm, np.array([len(own) for own in behind]), predicted, raw).max(1)
    counts = np.bincount(predicted, minlength=len(classes))
    groups = []
    for members in _pool(counts.tolist(), needed) if by_class else [tuple(classes)]:
        of_group = np.sort(scores[np.isin(predicted, members)])
        groups.append(Group(members, conformal_threshold(of_group, frr_budget), of_group))
    return Screen(groups, norm)


@dataclass(frozen=True)
class Parity:
    """How what one engine says of some clean texts compares with what the reference says."""

    decisions_agree: float
    """Share of the texts that both call poisoned, or neither, each by its own thresholds."""
    largest_difference: float
    """Of a probability."""


def parity(reference: FloatArray, own: FloatArray, checkpoints: int, frr_budget: float) -> Parity:
    """Compare an engine's readings with the reference's of the same texts, shape (n, V, C) each.

    Raises:
        CalibrationError: see `calibrate`.
    """

    def decisions(readings: FloatArray) -> NDArray[np.bool_]:
        screen = calibrate(readings, checkpoints, frr_budget)
        return np.array([screen.judge(row).poisoned for row in readings])

    agree = decisions(reference) == decisions(own)
    difference = np.abs(reference - own)[:, :checkpoints].max()
    return Parity(float(agree.mean()), float(difference))


def _norm(texts: Sequence[NDArray[np.float64]], checkpoints: int) -> Norm:
    """Return mean and standard deviation of what voices say, shape (n, V) for each class."""
    return Norm(
        np.stack([own.mean(0) for own in texts]),
        np.maximum(np.stack([own.std(0) for own in texts]), LEAST_SCALE),
        checkpoints,
    )


def _left_out(
    norm: Norm, sizes: NDArray[np.intp], predicted: NDArray[np.intp], raw: NDArray[np.float64]
) -> FloatArray:
    """Return scores of texts by the norm that the other n - 1 texts give, shape (n, V).

    A text pulls mean and deviation towards itself, so it would look less extreme than a new one
    just like it. Without it the mean lies n / (n - 1) times as far from it, and the variance is
    n / (n - 1) * (variance - deviation ** 2 / (n - 1)). Scores under zero are left as they are.

    Args:
        norm: of all texts.
        sizes: number of texts behind the norm of each class, shape (C,).
        predicted: classes, shape (n,).
        raw: what voices say, shape (n, V).
    """
    n = np.maximum(sizes[predicted], 2)[:, None]
    away, scale = raw - norm.centre[predicted], norm.scale[predicted]
    variance = n / (n - 1) * (scale**2 - away**2 / (n - 1))
    left_out = n / (n - 1) * away / np.sqrt(np.maximum(variance, LEAST_SCALE**2))
    scores: FloatArray = np.maximum(norm.scores(predicted, raw), left_out.astype(np.float32))
    return scores


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that every part has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])
