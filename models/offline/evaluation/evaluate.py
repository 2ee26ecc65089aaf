"""What an attack does to a victim, and what is left of it behind PSIM."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.bundle.load import Bundle
from models.detection.screen import FloatArray, Screen, Verdict
from models.engines.base import Engine
from models.offline.evaluation.metrics import (
    AttackOutcome,
    Classes,
    Defended,
    classes_of,
    outcome,
    poisoned_non_target,
    unflagged,
    within_class_scores,
)
from models.offline.io.inference import predict
from models.offline.io.samples import Sample

PAPER_THRESHOLD = 0.7
"""The one threshold of the paper, for all classes, models and data."""


@dataclass(frozen=True)
class Evaluation:
    """Outcomes side by side, and the scores that they come from."""

    none: AttackOutcome
    """No defence."""
    calibrated: AttackOutcome
    """The bundle's thresholds; AUROC of the score within the class."""
    paper: AttackOutcome
    """`PAPER_THRESHOLD` for all classes; AUROC of the bare confidence. Of the last checkpoint."""
    clean_scores: FloatArray
    poisoned_scores: FloatArray
    thresholds: dict[str, float]
    """By label."""


def evaluate(
    bundle: Bundle, clean: Sequence[Sample], poisoned: Sequence[Sample], target_label: str
) -> Evaluation:
    """Run clean and poisoned texts through PSIM and the victim of `bundle`.

    Raises:
        DataError: the target, or a label of a clean text, is not one of the bundle's.
    """
    labels = bundle.manifest.labels
    truth = classes_of(clean, labels)
    (target,) = classes_of([Sample("", target_label)], labels)
    poisoned = poisoned_non_target(poisoned, target_label)
    clean_view, poisoned_view = (
        View.of(bundle.engine, bundle.screen, [s.text for s in samples])
        for samples in (clean, poisoned)
    )
    return Evaluation(
        outcome(clean_view.bare, truth, poisoned_view.bare, int(target)),
        outcome(clean_view.calibrated, truth, poisoned_view.calibrated, int(target)),
        outcome(clean_view.paper, truth, poisoned_view.paper, int(target)),
        clean_view.scores,
        poisoned_view.scores,
        {label: bundle.screen.threshold_of(i) for i, label in enumerate(labels)},
    )


@dataclass(frozen=True)
class View:
    """PSIM's and the victim's view of some texts."""

    screen: Screen
    readings: FloatArray
    """What `Guarded.screen` gives, shape (n, V, C)."""
    predicted: Classes

    @staticmethod
    def of(engine: Engine, screen: Screen, texts: Sequence[str]) -> "View":
        """Run texts through PSIM and the victim."""
        encodings = engine.encode(texts)
        predicted = predict(engine, encodings, classifier=True).argmax(1)
        return View(screen, predict(engine, encodings), predicted)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """What the screen says about each text."""
        return [self.screen.judge(row) for row in self.readings]

    @property
    def scores(self) -> FloatArray:
        """Those of the verdicts, shape (n,)."""
        return np.array([v.score for v in self.verdicts], np.float32)

    @property
    def bare(self) -> Defended:
        """Without a defence."""
        return unflagged(self.predicted)

    @property
    def calibrated(self) -> Defended:
        """Behind the thresholds of the screen."""
        flagged = np.array([v.poisoned for v in self.verdicts], np.bool_)
        return Defended(self.predicted, flagged, within_class_scores(self.verdicts))

    @property
    def paper(self) -> Defended:
        """Behind `PAPER_THRESHOLD` for the confidence of the last checkpoint."""
        confidence = self.readings[:, self.screen.normalizer.checkpoints - 1].max(1)
        return Defended(self.predicted, confidence >= PAPER_THRESHOLD, confidence)
