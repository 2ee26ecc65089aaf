"""The rule that calls a text poisoned, written once for service, calibration and evaluation.

PSIM (Zhao et al., Findings of NAACL 2024, section 4) calls a text poisoned when the confidence of
the label-reset adapter stays extreme. What is extreme depends on the class: one class's clean texts
can be as confident as another's poisoned ones. So a confidence is compared only with clean texts of
the same predicted class, as in class-conditional (Mondrian) split conformal prediction
(Vovk et al., Algorithmic Learning in a Random World, section 4.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import ScreenError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What screening says about one text."""

    confidence: float
    """Largest PSIM softmax probability, in [1/C, 1], never rounded."""
    threshold: float
    """The text is poisoned iff `confidence >= threshold`."""
    p_value: float
    """Share of clean calibration texts at least as confident, in (0, 1]; small is suspicious."""
    poisoned: bool
    truncated: bool
    """True if neither PSIM nor the classifier read the whole text."""


def is_poisoned(confidence: float, threshold: float) -> bool:
    """The threshold rule, as the paper states it: extreme confidence means poisoned."""
    return confidence >= threshold


@dataclass(frozen=True)
class Group:
    """Clean calibration texts that are compared with each other: one class, or several pooled."""

    classes: tuple[int, ...]
    """Predicted class indices that belong here."""
    threshold: float
    scores: FloatArray
    """Confidences of the calibration texts, shape (n,), ascending."""

    def p_value(self, confidence: float) -> float:
        """Return (1 + #{calibration scores >= confidence}) / (n + 1), the conformal p-value."""
        n = len(self.scores)
        as_extreme = n - int(np.searchsorted(self.scores, np.float32(confidence), side="left"))
        return (1 + as_extreme) / (n + 1)


class Screen:
    """Judges PSIM probabilities against calibrated groups.

    Every class must belong to exactly one group, else `ValueError`.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._by_class = {index: group for group in groups for index in group.classes}
        claimed = sum(len(group.classes) for group in groups)
        if claimed != len(self._by_class) or set(self._by_class) != set(range(claimed)):
            raise ValueError("calibration groups must cover classes 0..C-1, each once")

    @property
    def num_classes(self) -> int:
        """Number of classes C that the groups cover."""
        return len(self._by_class)

    def threshold_of(self, predicted: int) -> float:
        """Return the threshold for texts that PSIM assigns to class `predicted`."""
        return self._by_class[predicted].threshold

    def judge(self, probabilities: FloatArray, truncated: bool = False) -> Verdict:
        """Judge one text by its PSIM probabilities, shape (C,).

        Raises:
            ScreenError: the probabilities are not finite or not C of them.
        """
        if probabilities.shape != (self.num_classes,) or not np.isfinite(probabilities).all():
            raise ScreenError("PSIM gave no finite probabilities; the input cannot be judged")
        predicted = int(probabilities.argmax())
        confidence = float(probabilities[predicted])
        group = self._by_class[predicted]
        return Verdict(
            confidence=confidence,
            threshold=group.threshold,
            p_value=group.p_value(confidence),
            poisoned=is_poisoned(confidence, group.threshold),
            truncated=truncated,
        )


def conformal_threshold(scores: FloatArray, frr_budget: float) -> float:
    """Return the least threshold whose expected false rejection rate is within the budget.

    With n exchangeable clean scores and one new one, at most floor(budget * (n + 1)) - 1 of the n
    may lie at or above the threshold (split conformal, finite-sample correction; Vovk et al.,
    section 4.2.2). The threshold is the float32 just above the highest score that must pass, so
    that the rule `confidence >= threshold` agrees with `p_value <= budget`.

    Args:
        scores: clean confidences, shape (n,), any order.
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
    """Return how many of n calibration scores may be rejected; -1 if n is too small to say."""
    return math.floor(frr_budget * (n + 1) + 1e-9) - 1


def min_calibration_size(frr_budget: float) -> int:
    """Return the least n for which a finite threshold can keep the budget."""
    return math.ceil(1 / frr_budget - 1e-9) - 1
