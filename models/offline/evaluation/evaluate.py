"""Evaluation of a bundle: an attack on its victim with and without PSIM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.bundle.load import Bundle
from models.detection.screen import FloatArray, Screen, Verdict
from models.offline.evaluation.metrics import (
    AttackOutcome,
    Classes,
    DefendedPredictions,
    classes_of,
    measure_outcome,
    poisoned_non_target,
    undefended,
    within_class_scores,
)
from models.offline.io.inference import predict, require_verdicts
from models.offline.io.samples import Sample, class_name, name_classes

PAPER_THRESHOLD = 0.7
"""The threshold that the paper uses for all classes, models and data sets."""


@dataclass(frozen=True)
class Evaluation:
    """Outcomes without PSIM and with it, and the scores behind them."""

    none: AttackOutcome
    """Outcome without a defence."""
    calibrated: AttackOutcome
    """Outcome if triggered texts are rejected; the AUROC is that of the final score."""
    strict: AttackOutcome
    """Outcome if unfamiliar texts are rejected too."""
    paper: AttackOutcome
    """Outcome with `PAPER_THRESHOLD` on the last checkpoint's confidence, also for the AUROC."""
    clean_scores: FloatArray
    poisoned_scores: FloatArray
    thresholds: dict[str, float]
    """Threshold of each label."""


def evaluate(
    bundle: Bundle, clean: Sequence[Sample], poisoned: Sequence[Sample], target_label: str
) -> Evaluation:
    """Measure an attack on clean and poisoned texts, with PSIM and the victim of `bundle`.

    Raises:
        DataError: the target or the label of a clean text is unknown to the bundle, which knows
            its classes by name, and those without a number as their name by number too.
    """
    labels = bundle.manifest.labels
    clean, poisoned = name_classes(clean, labels), name_classes(poisoned, labels)
    target_label = class_name(target_label, labels)
    truth = classes_of(clean, labels)
    target = int(classes_of([Sample("", target_label)], labels)[0])
    poisoned = poisoned_non_target(poisoned, target_label)
    screened_clean, screened_poisoned = (
        ScreenedTexts.run(bundle, [s.text for s in samples]) for samples in (clean, poisoned)
    )
    return Evaluation(
        measure_outcome(screened_clean.undefended, truth, screened_poisoned.undefended, target),
        measure_outcome(screened_clean.calibrated, truth, screened_poisoned.calibrated, target),
        measure_outcome(screened_clean.strict, truth, screened_poisoned.strict, target),
        measure_outcome(screened_clean.paper, truth, screened_poisoned.paper, target),
        screened_clean.scores,
        screened_poisoned.scores,
        {label: bundle.screen.threshold_of(i) for i, label in enumerate(labels)},
    )


@dataclass(frozen=True)
class ScreenedTexts:
    """Verdicts on some texts, and predictions of the victim."""

    verdicts: Sequence[Verdict]
    last_confidence: FloatArray
    """Largest probability of PSIM's last checkpoint, shape (n,)."""
    predicted: Classes
    """Classes that the victim predicts, shape (n,)."""

    @staticmethod
    def run(bundle: Bundle, texts: Sequence[str]) -> "ScreenedTexts":
        """Run texts through both stages and the victim.

        Raises:
            ScreenError: a text cannot be judged.
        """
        encodings = bundle.engine.encode(texts)
        predicted = predict(bundle.engine, encodings, classifier=True).argmax(1)
        return ScreenedTexts(
            require_verdicts(bundle, encodings),
            _last_confidence(bundle.screen, predict(bundle.engine, encodings)),
            predicted,
        )

    @staticmethod
    def of_first_stage(screen: Screen, readings: FloatArray, predicted: Classes) -> "ScreenedTexts":
        """Return what the first stage alone makes of readings, shape (n, V, C)."""
        verdicts = [screen.judge(row) for row in readings]
        return ScreenedTexts(verdicts, _last_confidence(screen, readings), predicted)

    @property
    def scores(self) -> FloatArray:
        """Scores of the verdicts, shape (n,)."""
        return np.array([v.score for v in self.verdicts], np.float32)

    @property
    def undefended(self) -> DefendedPredictions:
        """Results without a defence."""
        return undefended(self.predicted)

    @property
    def calibrated(self) -> DefendedPredictions:
        """Results if triggered texts are rejected."""
        return self._rejecting([v.poisoned for v in self.verdicts])

    @property
    def strict(self) -> DefendedPredictions:
        """Results if unfamiliar texts are rejected too."""
        return self._rejecting([v.finding is not None for v in self.verdicts])

    @property
    def paper(self) -> DefendedPredictions:
        """Results with `PAPER_THRESHOLD` on the confidence of the last checkpoint."""
        confidence = self.last_confidence
        return DefendedPredictions(self.predicted, confidence >= PAPER_THRESHOLD, confidence)

    def _rejecting(self, rejected: Sequence[bool]) -> DefendedPredictions:
        flags = np.array(rejected, np.bool_)
        return DefendedPredictions(self.predicted, flags, within_class_scores(self.verdicts))


def _last_confidence(screen: Screen, readings: FloatArray) -> FloatArray:
    confidence: FloatArray = readings[:, screen.normalizer.checkpoints - 1].max(1)
    return confidence
