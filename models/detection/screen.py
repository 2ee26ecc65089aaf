"""The rule that calls a text poisoned, written once for service, calibration and evaluation.

PSIM (Zhao et al., Findings of NAACL 2024, section 4) calls a text poisoned when the confidence of
the label-reset adapter stays extreme. What is extreme depends on the class that is predicted, since
one class's clean texts can be as confident as another's poisoned ones, and on the checkpoint of the
adapter. So a confidence is compared only with clean texts of the same predicted class, as in
class-conditional (Mondrian) split conformal prediction (Vovk et al., Algorithmic Learning in a
Random World, section 4.5), and checkpoint by checkpoint. So are the distances of hidden states to
the class, the second screen. What all these features say is one number in the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.errors import ScreenError

FloatArray = NDArray[np.float32]
Detector = Literal["confidence", "activations"]
TINY = 1e-12
"""Probabilities and distances under it are taken as it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What screening says about one text."""

    confidence: float
    """Largest PSIM softmax probability, in [1/C, 1], never rounded; of the checkpoint that finds
    it most extreme."""
    score: float
    """How extreme the text is among clean texts of the same class, in standard deviations; see
    `Normalizer.score`. Not negative."""
    detector: Detector
    """Which screen finds it most extreme."""
    threshold: float
    """The text is poisoned iff `score >= threshold`."""
    p_value: float
    """Share of clean calibration texts with at least this score, in (0, 1]; small is suspicious."""
    poisoned: bool
    truncated: bool
    """True if neither PSIM nor the classifier read the whole text."""
    predicted: int
    """The class, by number, whose clean texts this one was compared with."""

    @property
    def margin(self) -> float:
        """How far the score lies beyond the threshold; not negative iff poisoned.

        By this verdicts of all classes compare.
        """
        return self.score - self.threshold


def is_poisoned(score: float, threshold: float) -> bool:
    """The threshold rule, as the paper states it: extreme means poisoned."""
    return score >= threshold


@dataclass(frozen=True)
class ThresholdGroup:
    """Clean calibration texts that are compared with each other: one class, or several pooled."""

    classes: tuple[int, ...]
    """Predicted class indices that belong here."""
    threshold: float
    scores: FloatArray
    """Scores of the calibration texts, shape (n,), ascending."""

    def p_value(self, score: float) -> float:
        """Return (1 + #{calibration scores >= score}) / (n + 1), the conformal p-value."""
        n = len(self.scores)
        as_extreme = n - int(np.searchsorted(self.scores, np.float32(score), side="left"))
        return (1 + as_extreme) / (n + 1)


@dataclass(frozen=True)
class ZScore:
    """Turns N numbers about a text into standard deviations above those of clean texts.

    By predicted class; the deviation is that of the upper tail, see `models.detection.calibrate`.
    """

    centre: NDArray[np.float64]
    """Means, shape (C, N)."""
    scale: NDArray[np.float64]
    """Standard deviations, shape (C, N), positive."""

    def __call__(
        self, predicted: NDArray[np.intp], raw: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return standard deviations, shape (n, N), of `raw`, of the same shape."""
        standard: NDArray[np.float64] = (raw - self.centre[predicted]) / self.scale[predicted]
        return standard


@dataclass(frozen=True)
class Normalizer:
    """What clean texts look like to V features, K of which are PSIM's checkpoints."""

    features: ZScore
    """Of each detector."""
    components: ZScore
    """Of `pool_checkpoints`, V - K + 1 components."""
    checkpoints: int
    """K."""

    @staticmethod
    def score(components: NDArray[np.float64]) -> FloatArray:
        """Return the length of what is above zero in the components, shape (n,).

        What one part alone finds extreme stays extreme, and what several find odd adds up.

        Args:
            components: standard deviations of PSIM and of each distance, shape (n, V - K + 1).
        """
        length: FloatArray = np.linalg.norm(np.maximum(components, 0), axis=1).astype(np.float32)
        return length


def pool_checkpoints(standard: NDArray[np.float64], checkpoints: int) -> NDArray[np.float64]:
    """Return the largest of the checkpoints' features, and the other ones, shape (n, V - K + 1).

    The checkpoints are one training at several moments, so they have one part in the score.

    Args:
        standard: standard deviations, shape (n, V).
        checkpoints: K.
    """
    loudest = standard[:, :checkpoints].max(1, keepdims=True)
    return np.hstack([loudest, standard[:, checkpoints:]])


def features(
    readings: FloatArray, checkpoints: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return predicted classes, shape (n,), and what the features say, larger if more suspicious.

    That is log-odds of the K checkpoints and log-distances of hidden states to the predicted class,
    shape (n, V).

    Args:
        readings: what `Guarded.screen` gives, shape (n, V, C).
        checkpoints: K.
    """
    probabilities, distances = readings[:, :checkpoints], readings[:, checkpoints:]
    predicted = predicted_classes(probabilities)
    own = distances[np.arange(len(readings)), :, predicted].astype(np.float64)
    return predicted, np.hstack([log_odds(probabilities), np.log(np.maximum(own, TINY))])


def predicted_classes(probabilities: FloatArray) -> NDArray[np.intp]:
    """Return the class with the largest geometric mean over the checkpoints, shape (n,).

    Args:
        probabilities: PSIM's, shape (n, K, C).
    """
    classes: NDArray[np.intp] = np.log(np.maximum(probabilities, TINY)).mean(1).argmax(1)
    return classes


def log_odds(probabilities: FloatArray) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of the largest p of each checkpoint, shape (n, K).

    1 - p is taken as the sum of the other probabilities, which float32 can tell from 0 when it
    cannot tell p from 1.

    Args:
        probabilities: PSIM's, shape (n, K, C).
    """
    ordered = np.sort(probabilities.astype(np.float64), axis=-1)
    largest, rest = ordered[..., -1], ordered[..., :-1].sum(-1)
    odds: NDArray[np.float64] = np.log(np.maximum(largest, TINY) / np.maximum(rest, TINY))
    return odds


class Screen:
    """Judges readings against those of clean texts; made by `models.detection.calibrate`.

    Every class must belong to exactly one group, and have a normalizer, else `ValueError`.
    """

    def __init__(self, groups: Sequence[ThresholdGroup], normalizer: Normalizer) -> None:
        self.groups, self.normalizer = tuple(groups), normalizer
        self._by_class = {index: group for group in groups for index in group.classes}
        claimed = sum(len(group.classes) for group in groups)
        if claimed != len(self._by_class) or set(self._by_class) != set(range(claimed)):
            raise ValueError("calibration groups must cover classes 0..C-1, each once")
        measures = (normalizer.features, normalizer.components)
        if any(m.centre.shape != m.scale.shape or len(m.centre) != claimed for m in measures):
            raise ValueError("there must be a normalizer for every class")

    @property
    def shape(self) -> tuple[int, int]:
        """Number of features V and of classes C, the shape of a text's readings."""
        classes, number = self.normalizer.features.centre.shape
        return number, classes

    def threshold_of(self, predicted: int) -> float:
        """Return the threshold for texts that PSIM assigns to class `predicted`."""
        return self._by_class[predicted].threshold

    def flags(self, readings: FloatArray) -> NDArray[np.bool_]:
        """Say of texts by their readings, shape (n, V, C), which are poisoned.

        Raises:
            ScreenError: as `judge` does.
        """
        return np.array([self.judge(row).poisoned for row in readings], np.bool_)

    def judge(self, readings: FloatArray, truncated: bool = False) -> Verdict:
        """Judge one text by what `Guarded.screen` gives of it, shape (V, C).

        Raises:
            ScreenError: the readings are not finite or not of that shape.
        """
        if readings.shape != self.shape or not np.isfinite(readings).all():
            raise ScreenError("the screen gave no finite readings; the input cannot be judged")
        normalizer = self.normalizer
        predicted, raw = features(readings[None], normalizer.checkpoints)
        standard = normalizer.features(predicted, raw)
        components = normalizer.components(
            predicted, pool_checkpoints(standard, normalizer.checkpoints)
        )
        score, own = float(normalizer.score(components)[0]), int(predicted[0])
        group = self._by_class[own]
        surest = int(standard[0, : normalizer.checkpoints].argmax())
        return Verdict(
            confidence=float(readings[surest].max()),
            score=score,
            detector="confidence" if components[0].argmax() == 0 else "activations",
            threshold=group.threshold,
            p_value=group.p_value(score),
            poisoned=is_poisoned(score, group.threshold),
            truncated=truncated,
            predicted=own,
        )


def conformal_threshold(scores: FloatArray, frr_budget: float) -> float:
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
    """Return how many of n calibration scores may be rejected; -1 if n is too small to say."""
    return math.floor(frr_budget * (n + 1) + 1e-9) - 1


def min_calibration_size(frr_budget: float) -> int:
    """Return the least n for which a finite threshold can keep the budget."""
    return math.ceil(1 / frr_budget - 1e-9) - 1
