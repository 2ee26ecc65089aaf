"""The measures of an attack and of a defence, as Zhao et al. define them, made strict.

Definitions as in Zhao et al., NAACL Findings 2024, section 5.1, made strict where the text leaves
room: a rejected clean text counts as wrong, and an attack succeeds only on a text whose true label
is not the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from models.detection.screen import FloatArray, Verdict
from models.errors import DataError
from models.offline.io.samples import Sample
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
        """Return the share of true values; None of no texts at all."""
        if not len(hits):
            return None
        return Rate(float(hits.mean()), *clopper_pearson(int(hits.sum()), len(hits)), len(hits))


@dataclass(frozen=True)
class Defended:
    """What a defence and the victim behind it make of some texts; arrays of shape (n,)."""

    predicted: Classes
    """Classes that the victim gives, were it asked."""
    flagged: BoolArray | None
    """Texts that the defence rejects; None of a defence that never rejects, but rewrites."""
    scores: FloatArray | None = None
    """How suspicious each text is; None of a defence that has no score."""


def unflagged(predicted: Classes) -> Defended:
    """Return what becomes of texts without a defence."""
    return Defended(predicted, np.zeros(len(predicted), np.bool_))


REJECTING = ("false_rejection_rate", "false_acceptance_rate", "false_acceptance_rate_firing")
"""Measures that only a defence has that rejects texts."""


@dataclass(frozen=True)
class AttackOutcome:
    """What one defence does; None where that does not apply, or the texts do not tell."""

    clean_accuracy: Rate | None
    attack_success_rate: Rate | None
    false_rejection_rate: Rate | None
    false_acceptance_rate: Rate | None
    false_acceptance_rate_firing: Rate | None
    """Over the poisoned texts on which the backdoor fires: without defence, they get the target."""
    auroc: float | None
    """Of the scores, all poisoned texts."""
    auroc_firing: float | None
    """The same, where the backdoor fires."""


def outcome(
    clean: Defended,
    truth: Classes,
    poisoned: Defended,
    target: int | Classes,
    fires: BoolArray | None = None,
) -> AttackOutcome:
    """ZScore a defence.

    Args:
        clean: clean texts behind the defence.
        truth: their true classes, -1 where unknown, shape (n,).
        poisoned: poisoned texts behind the defence, none of whose true class is the target.
        target: the attacker's class; one for all poisoned texts, or shape (n,).
        fires: poisoned texts on which the backdoor fires without defence; by default those on
            which it fires with `poisoned`, which is the same unless the defence rewrites texts.
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


def classes_of(samples: Sequence[Sample], labels: Sequence[str]) -> Classes:
    """Return the samples' classes, -1 where the label is unknown, shape (n,).

    Raises:
        DataError: a label is not one of `labels`.
    """
    unknown = {s.label for s in samples if s.label is not None} - set(labels)
    if unknown:
        raise DataError(f"unknown labels {sorted(unknown)}; the victim has {list(labels)}")
    return np.array([-1 if s.label is None else labels.index(s.label) for s in samples], np.intp)


def within_class_scores(verdicts: Sequence[Verdict]) -> FloatArray:
    """Return how far the scores lie beyond their thresholds, shape (n,); not negative iff poisoned.

    By this the verdicts of all classes compare, and without the p-value's ties among the most
    extreme texts.
    """
    return np.array([v.margin for v in verdicts], np.float32)


def auroc(clean: FloatArray | None, poisoned: FloatArray | None) -> float | None:
    """Return the area under the ROC curve; None where a side has no scores."""
    if clean is None or poisoned is None or not len(clean) or not len(poisoned):
        return None
    truth = np.r_[np.zeros(len(clean)), np.ones(len(poisoned))]
    return float(roc_auc_score(truth, np.r_[clean, poisoned]))
