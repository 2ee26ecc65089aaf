"""Drift: whether passing inputs still resemble the clean texts that the bundle was calibrated with.

Scores are compared separately for each group of classes that share a threshold: a shift between
classes does not harm the screen. Inputs with a finding are left out, and so are calibration texts
at or above the threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle.load import Bundle
from models.detection.conformal import ThresholdGroup
from models.detection.screen import FloatArray, Verdict

SMALL = 0.04
"""Squared statistic, scaled, under which the series converges slowly and the p-value is 1."""
WINDOW = 2000
"""Latest inputs per group of classes that are compared."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two-sample Kolmogorov-Smirnov test of passing inputs against calibration texts."""

    labels: tuple[str, ...]
    """Classes that share the threshold."""
    inputs: int
    statistic: float
    """Largest distance of the two cumulative distributions, in [0, 1]; 0 without inputs."""
    p_value: float
    """Probability of such a statistic without drift; with many inputs, trifles make it small."""
    higher: bool
    """Whether inputs score higher than calibration texts where they differ most."""


class Drift:
    """Collects scores on one event loop; can be measured in any thread."""

    def __init__(self, bundle: Bundle) -> None:
        self._windows = [_Window(group, bundle.manifest.classes) for group in bundle.screen.groups]
        self._by_class = {c: w for w in self._windows for c in w.classes}

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Add the verdicts on some inputs."""
        for verdict in verdicts:
            if verdict.finding is None:
                self._by_class[verdict.predicted].add(verdict.score)

    def measure(self) -> list[Comparison]:
        """Return a comparison per group of classes; takes milliseconds."""
        return [window.compare() for window in self._windows]


class _Window:
    """Scores of the latest inputs of a group, and of its calibration texts."""

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
        inputs = self._scores[
            : min(self._seen, WINDOW)
        ].copy()  # the event loop may add more meanwhile
        if not len(inputs):
            return Comparison(self._labels, 0, 0.0, 1.0, False)
        difference, p_value = compare_samples(inputs, self._clean)
        return Comparison(self._labels, len(inputs), abs(difference), p_value, difference < 0)


def compare_samples(own: FloatArray, others: FloatArray) -> tuple[float, float]:
    """Return what the Kolmogorov-Smirnov test says of two samples: signed statistic, p-value.

    The statistic is negative where `own` scores higher. SciPy has the test, but importing
    `scipy.stats` takes a tenth of a service's memory.
    """
    scores = np.concatenate([own, others])
    differences = _cumulative(own, scores) - _cumulative(others, scores)
    statistic = float(differences[np.abs(differences).argmax()])
    return statistic, _p_value(abs(statistic), len(own), len(others))


def _cumulative(sample: FloatArray, scores: FloatArray) -> NDArray[np.float64]:
    """Return the share of a sample that is at most each score."""
    shares: NDArray[np.float64] = np.searchsorted(np.sort(sample), scores, "right") / len(sample)
    return shares


def _p_value(statistic: float, own: int, others: int) -> float:
    """Return the asymptotic p-value of the test, with Stephens' correction for small samples.

    Numerical Recipes (3rd edition), equations 6.14.57 and 14.3.18.
    """
    root = math.sqrt(own * others / (own + others))
    squared = (statistic * (root + 0.12 + 0.11 / root)) ** 2
    if squared < SMALL:
        return 1.0
    terms = [math.exp(-2 * k**2 * squared) for k in range(1, 101)]
    return min(max(2 * (sum(terms[::2]) - sum(terms[1::2])), 0.0), 1.0)
