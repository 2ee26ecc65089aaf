"""Evaluation of a bundle: an attack on its victim with and without PSIM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.bundle.load import Bundle
from models.bundle.manifest import Manifest
from models.detection.screen import FloatArray, Screen, Verdict
from models.detection.views import predicted_in
from models.errors import DataError
from models.offline.evaluation.metrics import (
    AttackOutcome,
    Classes,
    DefendedPredictions,
    classes_of,
    in_view_of,
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
    bundle: Bundle,
    clean: Sequence[Sample],
    poisoned: Sequence[Sample],
    target_label: str,
    *,
    thorough: bool | None = None,
) -> Evaluation:
    """Measure an attack on clean and poisoned texts, with PSIM and the victim of `bundle`.

    Args:
        bundle: what is evaluated.
        clean, poisoned: labelled texts.
        target_label: what the attacker wants. For a multi-label victim, `LABEL=on` or `LABEL=off`;
            then the accuracy is that of this label, and texts are rejected for any.
        thorough: whether all texts are tested, see `Manifest.tests_all_texts`.

    Raises:
        DataError: the target or the label of a clean text is unknown to the bundle, which knows
            its classes by name, and those without a number as their name by number too.
    """
    if not (manifest := bundle.manifest).multi_label:
        target_label = class_name(target_label, manifest.labels)
    view = _view_of(manifest, target_label)
    clean, poisoned = (_by_class_of(view, samples, manifest) for samples in (clean, poisoned))
    labels = [manifest.classes[c] for c in view]
    truth, target = classes_of(clean, labels), labels.index(target_label)
    screened_clean, screened_poisoned = (
        ScreenedTexts.run(bundle, [s.text for s in samples], view, thorough=thorough)
        for samples in (clean, poisoned_non_target(poisoned, target_label))
    )
    return Evaluation(
        measure_outcome(screened_clean.undefended, truth, screened_poisoned.undefended, target),
        measure_outcome(screened_clean.calibrated, truth, screened_poisoned.calibrated, target),
        measure_outcome(screened_clean.strict, truth, screened_poisoned.strict, target),
        measure_outcome(screened_clean.paper, truth, screened_poisoned.paper, target),
        screened_clean.scores,
        screened_poisoned.scores,
        {manifest.classes[c]: bundle.screen.threshold_of(c) for c in view},
    )


def _view_of(manifest: Manifest, target: str) -> range:
    """Return the view that an attacker's class is in."""
    for view in manifest.views:
        if target in (manifest.classes[c] for c in view):
            return view
    raise DataError(f"unknown labels {[target]}; the victim has {manifest.classes}")


def _by_class_of(view: range, samples: Sequence[Sample], manifest: Manifest) -> list[Sample]:
    """Return samples labelled by the names of the classes of a view."""
    if manifest.multi_label:
        return in_view_of(manifest.labels[view.start // len(view)], samples, manifest.labels)
    return name_classes(samples, manifest.labels)


@dataclass(frozen=True)
class ScreenedTexts:
    """Verdicts on some texts, and predictions of the victim."""

    verdicts: Sequence[Verdict]
    last_confidence: FloatArray
    """Largest probability of PSIM's last checkpoint, shape (n,)."""
    predicted: Classes
    """Classes that the victim predicts in a view, counted from 0, shape (n,)."""

    @staticmethod
    def run(
        bundle: Bundle, texts: Sequence[str], view: range, *, thorough: bool | None = None
    ) -> "ScreenedTexts":
        """Run texts through both stages and the victim, whose predictions are those in a view.

        Raises:
            ScreenError: a text cannot be judged.
        """
        encodings = bundle.engine.encode(texts)
        said = predict(bundle.engine, encodings, classifier=True)
        predicted = predicted_in(view, said, multi_label=bundle.manifest.multi_label)
        return ScreenedTexts(
            require_verdicts(bundle, encodings, thorough=thorough),
            _last_confidence(bundle.screen, predict(bundle.engine, encodings), view),
            predicted,
        )

    @staticmethod
    def of_first_stage(screen: Screen, readings: FloatArray, predicted: Classes) -> "ScreenedTexts":
        """Return what the first stage alone makes of readings, shape (n, V, C)."""
        verdicts = [screen.judge(row) for row in readings]
        last = _last_confidence(screen, readings, range(readings.shape[2]))
        return ScreenedTexts(verdicts, last, predicted)

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


def _last_confidence(screen: Screen, readings: FloatArray, view: range) -> FloatArray:
    last = readings[:, screen.normalizer.layout.checkpoints - 1, view.start : view.stop]
    confidence: FloatArray = last.max(1)
    return confidence
