"""What an attack does to a victim, and what is left of it behind PSIM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.bundle import Bundle
from models.engines import Engine
from models.offline.calibrate import predict
from models.offline.data import Sample
from models.offline.measures import (
    Classes,
    Defended,
    Outcome,
    classes_of,
    outcome,
    poisoned_non_target,
    unflagged,
    within_class_scores,
)
from models.screen import FloatArray, Screen, Verdict, is_poisoned

PAPER_THRESHOLD = 0.7
"""The one threshold of the paper, for all classes, models and data."""


@dataclass(frozen=True)
class Evaluation:
    """Outcomes side by side, and the confidences that they come from."""

    none: Outcome
    """No defence."""
    calibrated: Outcome
    """The bundle's thresholds; AUROC of the score within the class."""
    paper: Outcome
    """`PAPER_THRESHOLD` for all classes; AUROC of the bare confidence."""
    clean_confidence: FloatArray
    poisoned_confidence: FloatArray
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
        clean_view.confidence,
        poisoned_view.confidence,
        {label: bundle.screen.threshold_of(i) for i, label in enumerate(labels)},
    )


@dataclass(frozen=True)
class View:
    """PSIM's and the victim's view of some texts."""

    screen: Screen
    verdicts: list[Verdict]
    predicted: Classes

    @staticmethod
    def of(engine: Engine, screen: Screen, texts: Sequence[str]) -> "View":
        """Run texts through PSIM and the victim."""
        encodings = engine.encode(texts)
        verdicts = [screen.judge(row) for row in predict(engine, encodings)]
        return View(screen, verdicts, predict(engine, encodings, classifier=True).argmax(1))

    @property
    def confidence(self) -> FloatArray:
        """PSIM's confidences, shape (n,)."""
        return np.array([v.confidence for v in self.verdicts], np.float32)

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
        """Behind `PAPER_THRESHOLD`."""
        flagged = [is_poisoned(v.confidence, PAPER_THRESHOLD) for v in self.verdicts]
        return Defended(self.predicted, np.array(flagged, np.bool_), self.confidence)
