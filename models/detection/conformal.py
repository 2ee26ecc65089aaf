"""Conformal calibration: thresholds and p-values from the scores of clean texts.

Class-conditional (Mondrian) split conformal prediction, Vovk et al., Algorithmic Learning in a
Random World, section 4.5.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ThresholdGroup:
    """Clean calibration texts that are compared with each other: one class, or several pooled."""

    classes: tuple[int, ...]
    """Predicted class indices that belong here."""
    threshold: float
    scores: NDArray[np.float32]
    """Scores of the calibration texts, shape (n,), ascending."""

    def p_value(self, score: float) -> float:
        """Return (1 + #{calibration scores >= score}) / (n + 1), the conformal p-value."""
        n = len(self.scores)
        as_extreme = n - int(np.searchsorted(self.scores, np.float32(score), side="left"))
        return (1 + as_extreme) / (n + 1)


def conformal_threshold(scores: NDArray[np.float32], frr_budget: float) -> float:
    """Return the least threshold whose expected false rejection rate is within the budget.

    With n exchangeable clean scores and one new one, at most floor(budget * (n + 1)) - 1 of the n
    may lie at or above the threshold (split conformal, finite-sample correction; Vovk et al.,
    section 4.2.2). The threshold is the float32 just above the highest score that must pass, so
    that the rule `score >= threshold` agrees with `p_value <= budget`.

    Args:
        scores: clean scores, shape (n,), any order.
        frr_budget: tolerated share of rejected clean texts, in (0, 1).

    Raises:
        ValueError: n is under `min_calibration_size(frr_budget)`.
    """
    allowed = allowed_rejections(len(scores), frr_budget)
    if allowed < 0:
        needed = min_calibration_size(frr_budget)
        raise ValueError(f"{len(scores)} scores, but a budget of {frr_budget} needs {needed}")
    highest_passing = np.sort(scores)[len(scores) - allowed - 1]
    return float(np.nextafter(np.float32(highest_passing), np.float32(np.inf)))


def allowed_rejections(n: int, frr_budget: float) -> int:
    """Return how many of n calibration scores may be rejected; -1 if n is too small."""
    return math.floor(frr_budget * (n + 1) + 1e-9) - 1


def min_calibration_size(frr_budget: float) -> int:
    """Return the least n for which a finite threshold can keep the budget."""
    return math.ceil(1 / frr_budget - 1e-9) - 1
