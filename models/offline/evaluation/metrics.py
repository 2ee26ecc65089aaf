"""Measures of attacks and defences.

The definitions are those of Zhao et al., NAACL Findings 2024, section 5.1, in their strict reading:
a rejected clean text counts as wrong, and an attack succeeds only on a text whose true label is not
the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from models.detection.screen import FloatArray, Verdict
from models.detection.views import class_names
from models.errors import DataError
from models.offline.io.files import shown
from models.offline.io.samples import Sample, split_labels
from models.offline.statistics import clopper_pearson

BoolArray = NDArray[np.bool_]
Classes = NDArray[np.intp]


@dataclass(frozen=True)
class Rate:
    """A share of texts with its 95 % Clopper-Pearson interval."""

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(hits: BoolArray) -> "Rate | None":
        """Return the share of true values, or None if there are no texts."""
        if not len(hits):
            return None
        return Rate(float(hits.mean()), *clopper_pearson(int(hits.sum()), len(hits)), len(hits))


@dataclass(frozen=True)
class DefendedPredictions:
    """Results of a defence, and of the victim behind it, on some texts; arrays of shape (n,)."""

    predicted: Classes
    """Classes that the victim predicts, for rejected texts too."""
    flagged: BoolArray | None
    """Whether the defence rejects each text; None for a defence that rewrites texts instead."""
    scores: FloatArray | None = None
    """Suspicion of each text, larger if more suspicious; None for a defence without a score."""


def undefended(predicted: Classes) -> DefendedPredictions:
    """Return predictions without a defence: nothing is rejected."""
    return DefendedPredictions(predicted, np.zeros(len(predicted), np.bool_))


REJECTING = ("false_rejection_rate", "false_acceptance_rate", "false_acceptance_rate_firing")
"""Measures that exist only for a defence that rejects texts."""


@dataclass(frozen=True)
class AttackOutcome:
    """Measures of one defence; None if a measure does not apply or there are no texts for it."""

    clean_accuracy: Rate | None
    attack_success_rate: Rate | None
    false_rejection_rate: Rate | None
    false_acceptance_rate: Rate | None
    false_acceptance_rate_firing: Rate | None
    """The same over the poisoned texts on which the backdoor fires when there is no defence."""
    auroc: float | None
    """Area under the ROC curve of the scores, over all poisoned texts."""
    auroc_firing: float | None
    """The same over the poisoned texts on which the backdoor fires."""


def measure_outcome(
    clean: DefendedPredictions,
    truth: Classes,
    poisoned: DefendedPredictions,
    target: int | Classes,
    fires: BoolArray | None = None,
) -> AttackOutcome:
    """Measure an attack behind a defence.

    Args:
        clean: results on clean texts.
        truth: true classes of the clean texts, -1 if unknown, shape (n,).
        poisoned: results on poisoned texts whose true class is not the target.
        target: the attacker's class, for all poisoned texts or by text, shape (n,).
        fires: whether the backdoor fires on each poisoned text without a defence, shape (n,). By
            default this is read from `poisoned`, which is right unless the defence rewrites texts.
    """
    correct, hit = clean.predicted == truth, poisoned.predicted == target
    fires = hit if fires is None else fires
    firing = None if poisoned.scores is None else poisoned.scores[fires]
    if clean.flagged is None or poisoned.flagged is None:
        rejecting = dict.fromkeys(REJECTING)
    else:
        rejecting = {
            "false_rejection_rate": Rate.of(clean.flagged),
            "false_acceptance_rate": Rate.of(~poisoned.flagged),
            "false_acceptance_rate_firing": Rate.of(~poisoned.flagged[fires]),
        }
        correct, hit = correct & ~clean.flagged, hit & ~poisoned.flagged
    return AttackOutcome(
        clean_accuracy=Rate.of(correct[truth >= 0]),
        attack_success_rate=Rate.of(hit),
        **rejecting,
        auroc=auroc(clean.scores, poisoned.scores),
        auroc_firing=auroc(clean.scores, firing),
    )


def poisoned_non_target(samples: Sequence[Sample], target_label: str) -> list[Sample]:
    """Return the samples whose true label is not the target, on which an attack can be measured.

    Poison files are labelled either with the true labels or throughout with the target. If every
    label is the target, the second kind is assumed, and all samples are returned.

    Raises:
        DataError: there are no samples.
    """
    others = [s for s in samples if s.label != target_label]
    if not samples:
        raise DataError("there are no poisoned texts")
    return others or list(samples)


CONFIRMED = 1e3
"""More than the distance of any score from its threshold."""


def classes_of(samples: Sequence[Sample], labels: Sequence[str]) -> Classes:
    """Return the class index of each sample, -1 for samples without a label, shape (n,).

    Raises:
        DataError: a label is not one of `labels`.
    """
    unknown = {s.label for s in samples if s.label is not None} - set(labels)
    if unknown:
        raise DataError(f"unknown labels {shown(unknown)}; the victim has {list(labels)}")
    return np.array([-1 if s.label is None else labels.index(s.label) for s in samples], np.intp)


def in_view_of(label: str, samples: Sequence[Sample], labels: Sequence[str]) -> list[Sample]:
    """Return texts of a multi-label task, labelled by whether one label is on or off.

    Raises:
        DataError: a text has a label that is not one of `labels`.
    """
    by_text = [None if s.label is None else split_labels(s.label) for s in samples]
    unknown = {label for own in by_text for label in own or ()} - set(labels)
    if unknown:
        raise DataError(
            f"unknown labels {sorted(unknown)}; the victim has {list(labels)}, and any number of "
            "them may be on: give a list in JSON, or a|b, or [] where none is"
        )
    off, on = class_names([label], multi_label=True)
    return [
        Sample(s.text, None if own is None else on if label in own else off)
        for s, own in zip(samples, by_text, strict=True)
    ]


def within_class_scores(verdicts: Sequence[Verdict]) -> FloatArray:
    """Return the final score of each text, shape (n,), which can be compared between classes.

    It is the distance of the first stage's score from its threshold, and what the override test
    confirms comes before all other texts. Unlike p-values, distances do not tie among the most
    extreme texts.
    """
    return np.array([v.margin + CONFIRMED * v.poisoned for v in verdicts], np.float32)


def auroc(clean: FloatArray | None, poisoned: FloatArray | None) -> float | None:
    """Return the area under the ROC curve, or None if either kind of text has no scores."""
    if clean is None or poisoned is None or not len(clean) or not len(poisoned):
        return None
    truth = np.r_[np.zeros(len(clean)), np.ones(len(poisoned))]
    return float(roc_auc_score(truth, np.r_[clean, poisoned]))
