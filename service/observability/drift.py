"""Whether the inputs that pass are still like the clean texts that the bundle was calibrated with.

Compared are the scores, within the classes that share a threshold: shares of classes may shift
without harm to the screen. What is found poisoned is left out, and so is of the calibration what
lies beyond the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from models.bundle.load import Bundle
from models.detection.conformal import ThresholdGroup
from models.detection.screen import FloatArray, Verdict

WINDOW = 2000
"""The latest inputs of a group of classes; what came before is forgotten."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of passing inputs beside those of calibration texts, two-sample Kolmogorov-Smirnov."""

    labels: tuple[str, ...]
    """The classes that are compared together, since they share a threshold."""
    inputs: int
    statistic: float
    """By how much, at most, the shares under any one score differ, in [0, 1]; 0 without inputs."""
    p_value: float
    """Of that or more between samples of one distribution; with many inputs small for trifles."""
    higher: bool
    """Whether, where they differ most, more of the inputs lie above."""


class Drift:
    """Takes verdicts from one event loop; is measured in any thread, when somebody asks."""

    def __init__(self, bundle: Bundle) -> None:
        self._windows = [_Window(group, bundle.manifest.labels) for group in bundle.screen.groups]
        self._by_class = {c: w for w in self._windows for c in w.classes}

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Take what screening said of inputs."""
        for verdict in verdicts:
            if not verdict.poisoned:
                self._by_class[verdict.predicted].add(verdict.score)

    def measure(self) -> list[Comparison]:
        """Compare each group of classes; takes milliseconds."""
        return [window.compare() for window in self._windows]


class _Window:
    """The scores of the latest inputs of a group, and those of its calibration texts."""

    def __init__(self, group: ThresholdGroup, names: Sequence[str]) -> None:
        self.classes = group.classes
        self._labels = tuple(names[c] for c in group.classes)
        self._clean = group.scores[group.scores < group.threshold]
        self._scores: FloatArray = np.zeros(WINDOW, np.float32)
        self._seen = 0

    def add(self, score: float) -> None:
        self._scores[self._seen % WINDOW] = score
        self._seen += 1

    def compare(self) -> Comparison:
        inputs = self._scores[: min(self._seen, WINDOW)].copy()  # more may come meanwhile
        if not len(inputs):
            return Comparison(self._labels, 0, 0.0, 1.0, False)
        # The exact p-value says the same, and takes up to a hundred times as long.
        found = ks_2samp(inputs, self._clean, method="asymp")
        return Comparison(
            self._labels,
            len(inputs),
            float(found.statistic),
            float(found.pvalue),
            bool(found.statistic_sign < 0),
        )
