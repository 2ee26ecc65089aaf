"""A screen from clean texts alone: one threshold per predicted class, for a rejection budget."""

import numpy as np

from models.errors import CalibrationError
from models.screen import (
    FloatArray,
    Group,
    Norm,
    Screen,
    conformal_threshold,
    log_odds,
    min_calibration_size,
    predicted_classes,
)

LEAST_FOR_NORM = 30
"""Texts that a class needs for a mean and a standard deviation of its own."""
LEAST_SCALE = 1e-3
"""Classes whose clean texts are all equally confident would have none."""


def calibrate(probabilities: FloatArray, frr_budget: float, *, by_class: bool = True) -> Screen:
    """Return a screen with a threshold per predicted class, small classes pooled.

    Class-conditional split conformal prediction (see `models.screen`): if the clean texts to come
    are exchangeable with these, the expected false rejection rate of each group is within the
    budget, and so is the total. Classes with too few texts for a threshold of their own share one,
    together with the smallest of the other classes if they are still too few. Mean and standard
    deviation come from the same texts, which favours those over the texts to come by no more than
    one text in n does.

    Args:
        probabilities: PSIM's, of clean texts that it was not trained on, shape (n, K, C).
        frr_budget: tolerated share of rejected clean texts, in (0, 1).
        by_class: False compares texts of all classes, for comparison.

    Raises:
        CalibrationError: too few texts in all, or probabilities that are not finite.
    """
    if not np.isfinite(probabilities).all():
        raise CalibrationError("the victim gives NaN or infinite scores on the clean texts")
    needed = min_calibration_size(frr_budget)
    if len(probabilities) < needed:
        raise CalibrationError(
            f"{len(probabilities)} calibration texts are too few for a false-rejection budget of "
            f"{frr_budget}: it needs {needed}; give more clean texts or a larger --frr-budget"
        )
    norm = _norm(probabilities, by_class)
    predicted, by_checkpoint = norm.scores(probabilities)
    scores, classes = by_checkpoint.max(1), range(probabilities.shape[2])
    counts = np.bincount(predicted, minlength=len(classes))
    groups = []
    for own in _pool(counts.tolist(), needed) if by_class else [tuple(classes)]:
        of_group = np.sort(scores[np.isin(predicted, own)])
        groups.append(Group(own, conformal_threshold(of_group, frr_budget), of_group))
    return Screen(groups, norm)


def _norm(probabilities: FloatArray, by_class: bool) -> Norm:
    """Return mean and standard deviation by class; those of all texts where a class has few."""
    odds, predicted = log_odds(probabilities), predicted_classes(probabilities)
    members = [predicted == c for c in range(probabilities.shape[2])]
    own = [
        odds[member] if by_class and member.sum() >= LEAST_FOR_NORM else odds for member in members
    ]
    return Norm(
        np.stack([texts.mean(0) for texts in own]),
        np.maximum(np.stack([texts.std(0) for texts in own]), LEAST_SCALE),
    )


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that every part has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])
