"""The rule that judges a text, written once for service, calibration and evaluation.

The first stage finds a text extreme by its score. A second stage, the override test, may then ask
of an extreme text whether it overrides clean sentences, see `with_override`.

There are three detectors. The confidence detector is PSIM (Zhao et al., Findings of NAACL 2024,
section 4): a text is poisoned when the confidence of the label-reset adapter stays extreme; each
checkpoint of the adapter gives one feature. The features of the activation detector are distances
of hidden states to the predicted class. The attention detector has one feature: how much of the
classifier's attention a single token draws.

What is extreme depends on the predicted class, since one class's clean texts can be as confident as
another's poisoned ones. So each feature is compared only with clean texts of the same predicted
class (see `models.detection.conformal`). All features together give one score.

A multi-label classifier predicts a class in several views (see `models.detection.views`). Then a
text gets a verdict in each, and the worst one is that of the text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.detection.conformal import ThresholdGroup, conformal_threshold
from models.detection.views import Views
from models.errors import ScreenError

FloatArray = NDArray[np.float32]
Detector = Literal["confidence", "activations", "attention"]
SUSPICION = 0.05
"""Share of clean texts that the first stage passes on to the override test, over all views."""
MIN_SUSPICIOUS = 5
"""Calibration texts above that score at least, so that no single one decides what is tested."""
NOT_FINITE = "the screen gave no finite readings; the input cannot be judged"
TINY = 1e-12
"""Floor for probabilities and distances, so that their logarithms are finite."""


class Finding(StrEnum):
    """What the screen finds in a text, the worse first."""

    TRIGGERED = "triggered"
    """The override test confirmed it, or could not be asked."""
    UNFAMILIAR = "unfamiliar"
    """Extreme, and not confirmed: a trigger of syntax or style, or a text of another kind."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of screening one text."""

    confidence: float
    """Largest PSIM probability of a class in the view, never rounded; from the checkpoint that
    finds the text most extreme."""
    score: float
    """How extreme the text is among clean texts of the same class, in standard deviations; see
    `Normalizer.score`. Not negative."""
    detector: Detector
    """The detector that finds the text most extreme."""
    threshold: float
    """The text is extreme iff `score >= threshold`."""
    p_value: float
    """Share of clean calibration texts with at least this score, in (0, 1]; small is suspicious.
    With several views it is multiplied by their number (Bonferroni)."""
    truncated: bool
    """True if neither PSIM nor the classifier read the whole text."""
    predicted: int
    """Index of the class whose clean texts this one was compared with."""
    finding: Finding | None
    """None if nothing was found."""
    suspected: bool = False
    """Whether the text is one of the few percent that look most extreme for clean ones."""
    override: float | None = None
    """Score of the override test; None if it was not asked."""
    override_threshold: float | None = None
    """The text is triggered if `override >= override_threshold`."""
    override_p_value: float | None = None
    """As `p_value`, of `override`."""

    @property
    def extreme(self) -> bool:
        """Whether the text is unlike clean texts of its class."""
        return is_extreme(self.score, self.threshold)

    @property
    def poisoned(self) -> bool:
        """Whether the text is taken to hold a trigger."""
        return self.finding is Finding.TRIGGERED

    @property
    def margin(self) -> float:
        """Distance of the score beyond the threshold; not negative iff extreme.

        Margins are comparable across classes.
        """
        return self.score - self.threshold


def with_override(
    verdict: Verdict, override: float, override_threshold: float, override_p_value: float
) -> Verdict:
    """Return a verdict of the first stage together with the outcome of the override test."""
    finding = Finding.UNFAMILIAR if verdict.extreme else None
    return replace(
        verdict,
        override=override,
        override_threshold=override_threshold,
        override_p_value=override_p_value,
        finding=Finding.TRIGGERED if override >= override_threshold else finding,
    )


def worst_finding(findings: Iterable[Finding | None]) -> Finding | None:
    """Return the worst finding; None if there is none."""
    found = {*findings}
    return next((finding for finding in Finding if finding in found), None)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict with the worst finding; among those, the one with the largest margin."""
    return max(verdicts, key=lambda verdict: (verdict.poisoned, verdict.margin))


def is_extreme(score: float, threshold: float) -> bool:
    """The threshold rule, as the paper states it."""
    return score >= threshold


@dataclass(frozen=True)
class Layout:
    """Which of a text's V readings, and of the features made of them, are whose.

    First come those of PSIM's checkpoints, then the distances by watched layer, if any.
    """

    checkpoints: int
    """K."""
    attention: bool = False
    """Whether the last one is the peak of attention."""

    def by_detector(self, number: int) -> dict[Detector, slice]:
        """Return the detectors that V = `number` features are from, and which are theirs."""
        distances = number - self.attention
        found: dict[Detector, slice] = {
            "confidence": slice(0, self.checkpoints),
            "activations": slice(self.checkpoints, distances),
            "attention": slice(distances, number),
        }
        return {name: own for name, own in found.items() if own.start < own.stop}


@dataclass(frozen=True)
class ZScore:
    """Standardizes N numbers about a text by those of clean texts of the same predicted class.

    The deviation is that of the upper tail, see `models.detection.calibrate`.
    """

    centre: NDArray[np.float64]
    """Means, shape (C, N)."""
    scale: NDArray[np.float64]
    """Standard deviations, shape (C, N), positive."""

    def __call__(
        self, predicted: NDArray[np.intp], raw: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return z-scores, shape (n, N), of `raw`, of the same shape."""
        z: NDArray[np.float64] = (raw - self.centre[predicted]) / self.scale[predicted]
        return z


@dataclass(frozen=True)
class Normalizer:
    """Statistics of clean texts, V features of each."""

    features: ZScore
    """Of the V features."""
    components: ZScore
    """Of the components that `by_detector` makes of them."""
    layout: Layout

    @staticmethod
    def score(components: NDArray[np.float64]) -> FloatArray:
        """Return the Euclidean norm of the components' positive parts, shape (n,).

        A text that one component finds extreme stays extreme, and moderate ones add up.

        Args:
            components: z-scores of the detectors, shape (n, 1 to 3).
        """
        norms: FloatArray = np.linalg.norm(np.maximum(components, 0), axis=1).astype(np.float32)
        return norms


def by_detector(standard: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """Return the largest feature of each detector, shape (n, 1 to 3), in the layout's order.

    The checkpoints are one training at several moments, and neighbouring layers see much the same,
    so they share one component of the score each.

    Args:
        standard: z-scores of the features, shape (n, V).
        layout: whose features they are.
    """
    own = layout.by_detector(standard.shape[1]).values()
    return np.stack([standard[:, features].max(1) for features in own], 1)


def features(
    readings: FloatArray, checkpoints: int, view: range | None = None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return predicted classes, shape (n,), and features, shape (n, V), larger if more suspicious.

    Features are the log-odds of the K checkpoints, and the logarithms of the other readings: the
    distances of hidden states to the predicted class, and the peak of attention.

    Args:
        readings: output of `Guarded.screen`, shape (n, V, C).
        checkpoints: K.
        view: classes to choose from; all of them by default.
    """
    view = view or range(readings.shape[2])
    readings = readings[:, :, view.start : view.stop]
    probabilities, others = readings[:, :checkpoints], readings[:, checkpoints:]
    predicted = predicted_classes(probabilities)
    own = others[np.arange(len(readings)), :, predicted].astype(np.float64)
    raw = np.hstack([log_odds(probabilities), np.log(np.maximum(own, TINY))])
    return predicted + view.start, raw


def predicted_classes(probabilities: FloatArray) -> NDArray[np.intp]:
    """Return the class with the largest geometric mean over the checkpoints, shape (n,).

    Args:
        probabilities: PSIM's, shape (n, K, C).
    """
    classes: NDArray[np.intp] = np.log(np.maximum(probabilities, TINY)).mean(1).argmax(1)
    return classes


def logit(probability: float) -> float:
    """Return log(p / (1 - p)), finite for 0 and 1 too."""
    return math.log(max(probability, TINY) / max(1 - probability, TINY))


def log_odds(probabilities: FloatArray) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of each checkpoint's largest p, shape (n, K).

    1 - p is the sum of the other probabilities, which float32 can tell from 0 when it cannot tell p
    from 1.

    Args:
        probabilities: PSIM's, shape (n, K, C).
    """
    ordered = np.sort(probabilities.astype(np.float64), axis=-1)
    largest, rest = ordered[..., -1], ordered[..., :-1].sum(-1)
    odds: NDArray[np.float64] = np.log(np.maximum(largest, TINY) / np.maximum(rest, TINY))
    return odds


def log_odds_of(probabilities: FloatArray, index: int) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of one class, shape (n, K).

    Args:
        probabilities: PSIM's, shape (n, K, C).
        index: the class.
    """
    exact = probabilities.astype(np.float64)
    own, rest = exact[..., index], np.delete(exact, index, -1).sum(-1)
    odds: NDArray[np.float64] = np.log(np.maximum(own, TINY) / np.maximum(rest, TINY))
    return odds


def _suspicion(scores: NDArray[np.float32], views: int) -> float:
    """Return the score from which a text is suspicious, by those of clean texts, shape (n,)."""
    share = max(SUSPICION / views, MIN_SUSPICIOUS / (len(scores) + 1))
    return conformal_threshold(scores, share) if share < 1 else float(scores.min())


class Screen:
    """Judges readings against those of clean texts; made by `models.detection.calibrate`.

    Args:
        groups: thresholds; every class belongs to exactly one group.
        normalizer: statistics of clean texts for every class.
        views: classes that exclude each other; one view of all classes by default.

    Raises:
        ValueError: a class has no group, several, or no statistics.
    """

    def __init__(
        self, groups: Sequence[ThresholdGroup], normalizer: Normalizer, views: Views = ()
    ) -> None:
        self.groups, self.normalizer = tuple(groups), normalizer
        self.views = tuple(views) or (range(len(normalizer.features.centre)),)
        self._by_class = {index: group for group in groups for index in group.classes}
        self._suspicion = {
            index: min(group.threshold, _suspicion(group.scores, len(self.views)))
            for index, group in self._by_class.items()
        }
        claimed = sum(len(group.classes) for group in groups)
        if claimed != len(self._by_class) or set(self._by_class) != set(range(claimed)):
            raise ValueError("calibration groups must cover classes 0..C-1, each once")
        z_scores = (normalizer.features, normalizer.components)
        if any(z.centre.shape != z.scale.shape or len(z.centre) != claimed for z in z_scores):
            raise ValueError("there must be a normalizer for every class")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a text's readings: number of features V, number of classes C."""
        classes, number = self.normalizer.features.centre.shape
        return number, classes

    def threshold_of(self, predicted: int) -> float:
        """Return the threshold for texts that PSIM assigns to class `predicted`."""
        return self._by_class[predicted].threshold

    def flags(self, readings: FloatArray) -> NDArray[np.bool_]:
        """Return which texts are extreme, shape (n,), by their readings, shape (n, V, C).

        Raises:
            ScreenError: as `judge` does.
        """
        return np.array([self.judge(row).extreme for row in readings], np.bool_)

    def judge(self, readings: FloatArray, truncated: bool = False) -> Verdict:
        """Judge one text by its readings from `Guarded.screen`, shape (V, C): its worst verdict.

        The override test is not asked here, so an extreme text counts as triggered.

        Raises:
            ScreenError: the readings are not finite or not of that shape.
        """
        return worst_verdict(self.verdicts(readings, truncated))

    def verdicts(self, readings: FloatArray, truncated: bool = False) -> list[Verdict]:
        """Judge one text in every view, as `judge` does."""
        (own,) = self.verdicts_of_batch(readings[None], [truncated])
        if own is None:
            raise ScreenError(NOT_FINITE)
        return own

    def verdicts_of_batch(
        self, readings: FloatArray, truncated: Sequence[bool]
    ) -> list[list[Verdict] | None]:
        """Judge n texts in every view, as `verdicts` does; None if readings cannot be judged.

        Args:
            readings: shape (n, V, C).
            truncated: whether each text was cut.
        """
        found: list[list[Verdict] | None] = [None] * len(readings)
        if readings.shape[1:] != self.shape:
            return found
        finite = np.flatnonzero(np.isfinite(readings).all((1, 2))).tolist()
        cut = [truncated[number] for number in finite]
        by_view = [self._verdicts_in(view, readings[finite], cut) for view in self.views]
        for number, *own in zip(finite, *by_view, strict=True):
            found[number] = own
        return found

    def _verdicts_in(
        self, view: range, readings: FloatArray, truncated: Sequence[bool]
    ) -> list[Verdict]:
        normalizer = self.normalizer
        checkpoints = normalizer.layout.checkpoints
        predicted, raw = features(readings, checkpoints, view)
        standard = normalizer.features(predicted, raw)
        components = normalizer.components(predicted, by_detector(standard, normalizer.layout))
        most_extreme = standard[:, :checkpoints].argmax(1)
        own = readings[np.arange(len(readings)), most_extreme, view.start : view.stop]
        detectors = [*normalizer.layout.by_detector(standard.shape[1])]
        columns = (
            predicted.tolist(),
            normalizer.score(components).tolist(),
            own.max(1).tolist(),
            components.argmax(1).tolist(),
            truncated,
        )
        return [
            self._verdict(label, score, confidence, detectors[worst], cut)
            for label, score, confidence, worst, cut in zip(*columns, strict=True)
        ]

    def _verdict(
        self, predicted: int, score: float, confidence: float, detector: Detector, truncated: bool
    ) -> Verdict:
        group = self._by_class[predicted]
        return Verdict(
            confidence=confidence,
            score=score,
            detector=detector,
            threshold=group.threshold,
            p_value=min(1.0, len(self.views) * group.p_value(score)),
            truncated=truncated,
            predicted=predicted,
            finding=Finding.TRIGGERED if is_extreme(score, group.threshold) else None,
            suspected=score >= self._suspicion[predicted],
        )
