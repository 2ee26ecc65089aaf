"""What an attack does to a victim, and what is left of it behind PSIM.

Definitions as in Zhao et al., NAACL Findings 2024, section 5.1, made strict where the text leaves
room: a rejected clean text counts as wrong, and an attack succeeds only on a text whose true label
is not the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from models.bundle import Bundle
from models.errors import DataError
from models.offline.calibrate import clopper_pearson, predict
from models.offline.data import Sample
from models.screen import FloatArray, Verdict, is_poisoned

PAPER_THRESHOLD = 0.7
"""The one threshold of the paper, for all classes, models and data."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Rate:
    """A share of texts with its 95 % Clopper-Pearson interval."""

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(hits: BoolArray) -> "Rate | None":
        """Return the share of true values; None of no texts at all."""
        if not len(hits):
            return None
        return Rate(float(hits.mean()), *clopper_pearson(int(hits.sum()), len(hits)), len(hits))


@dataclass(frozen=True)
class Outcome:
    """What one rule does; None where the texts do not tell (no labels, or no such text)."""

    clean_accuracy: Rate | None
    attack_success_rate: Rate | None
    false_rejection_rate: Rate | None
    false_acceptance_rate: Rate | None
    false_acceptance_rate_firing: Rate | None
    """Over the poisoned texts on which the backdoor fires: without defence, they get the target."""


@dataclass(frozen=True)
class Evaluation:
    """Outcomes side by side, and how well the scores separate whatever the threshold."""

    none: Outcome
    """No defence."""
    calibrated: Outcome
    """The bundle's thresholds."""
    paper: Outcome
    """`PAPER_THRESHOLD` for all classes."""
    auroc_confidence: float | None
    """Of the bare confidence, all poisoned texts."""
    auroc: float | None
    """Of the calibrated within-class score, all poisoned texts."""
    auroc_firing: float | None
    """The same, where the backdoor fires."""
    clean_confidence: FloatArray
    poisoned_confidence: FloatArray
    thresholds: dict[str, float]
    """By label."""


def poisoned_non_target(samples: Sequence[Sample], target_label: str) -> list[Sample]:
    """Return the samples that can show an attack: those whose true label is not the target.

    Poison files come labelled in two ways: with true labels, or all with the target. If every
    label is the target, the file is taken as of the second kind.

    Raises:
        DataError: no samples.
    """
    others = [s for s in samples if s.label != target_label]
    if not samples:
        raise DataError("there are no poisoned texts")
    return others or list(samples)


def evaluate(
    bundle: Bundle, clean: Sequence[Sample], poisoned: Sequence[Sample], target_label: str
) -> Evaluation:
    """Run clean and poisoned texts through PSIM and the victim of `bundle`.

    Raises:
        DataError: the target, or a label of a clean text, is not one of the bundle's.
    """
    labels = bundle.manifest.labels
    unknown = {s.label for s in clean if s.label is not None} | {target_label}
    if unknown := unknown - set(labels):
        raise DataError(f"unknown labels {sorted(unknown)}; the victim has {labels}")
    poisoned = poisoned_non_target(poisoned, target_label)
    clean_view, poisoned_view = _View.of(bundle, clean), _View.of(bundle, poisoned)
    truth = np.array([labels.index(s.label) if s.label is not None else -1 for s in clean])
    fires = poisoned_view.predicted == labels.index(target_label)
    correct = clean_view.predicted == truth

    def outcome(clean_flag: BoolArray, poisoned_flag: BoolArray) -> Outcome:
        return Outcome(
            clean_accuracy=Rate.of((correct & ~clean_flag)[truth >= 0]),
            attack_success_rate=Rate.of(fires & ~poisoned_flag),
            false_rejection_rate=Rate.of(clean_flag),
            false_acceptance_rate=Rate.of(~poisoned_flag),
            false_acceptance_rate_firing=Rate.of(~poisoned_flag[fires]),
        )

    return Evaluation(
        none=outcome(np.zeros_like(correct), np.zeros_like(fires)),
        calibrated=outcome(clean_view.flagged, poisoned_view.flagged),
        paper=outcome(
            clean_view.flagged_at(PAPER_THRESHOLD), poisoned_view.flagged_at(PAPER_THRESHOLD)
        ),
        auroc_confidence=_auroc(clean_view.confidence, poisoned_view.confidence),
        auroc=_auroc(clean_view.scores, poisoned_view.scores),
        auroc_firing=_auroc(clean_view.scores, poisoned_view.scores[fires]),
        clean_confidence=clean_view.confidence,
        poisoned_confidence=poisoned_view.confidence,
        thresholds={label: bundle.screen.threshold_of(i) for i, label in enumerate(labels)},
    )


@dataclass(frozen=True)
class _View:
    """PSIM's and the victim's view of some texts."""

    verdicts: list[Verdict]
    predicted: NDArray[np.intp]

    @staticmethod
    def of(bundle: Bundle, samples: Sequence[Sample]) -> "_View":
        encodings = bundle.engine.encode([s.text for s in samples])
        probabilities = predict(bundle.engine, encodings)
        verdicts = [bundle.screen.judge(row) for row in probabilities]
        return _View(verdicts, predict(bundle.engine, encodings, classifier=True).argmax(1))

    @property
    def confidence(self) -> FloatArray:
        return np.array([v.confidence for v in self.verdicts], np.float32)

    @property
    def scores(self) -> FloatArray:
        return within_class_scores(self.verdicts)

    @property
    def flagged(self) -> BoolArray:
        return np.array([v.poisoned for v in self.verdicts])

    def flagged_at(self, threshold: float) -> BoolArray:
        return np.array([is_poisoned(v.confidence, threshold) for v in self.verdicts])


def within_class_scores(verdicts: Sequence[Verdict]) -> FloatArray:
    """Return scores by which verdicts of all classes compare: how far beyond their own threshold.

    The distance is in log-odds of the confidence, so that it is monotone within a class, positive
    iff poisoned, and without the p-value's ties among the most extreme texts.
    """
    ends = (1e-9, 1 - 1e-9)
    confidence = np.clip([v.confidence for v in verdicts], *ends)
    threshold = np.clip([v.threshold for v in verdicts], *ends)
    return (logit(confidence) - logit(threshold)).astype(np.float32)


def _auroc(clean: FloatArray, poisoned: FloatArray) -> float | None:
    if not len(clean) or not len(poisoned):
        return None
    truth = np.r_[np.zeros(len(clean)), np.ones(len(poisoned))]
    return float(roc_auc_score(truth, np.r_[clean, poisoned]))
