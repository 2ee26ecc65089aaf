"""Defences from the literature that look for anomalies in hidden states.

BadActs, DAN, DUP and LCF. Start with `StateDetector`, which all of them have in common. Their
statistics are of one half of the clean texts, and the threshold of the other half. None needs a
pass of its own.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.metrics import calinski_harabasz_score

from models.detection.screen import FloatArray
from models.offline.evaluation.metrics import Classes, DefendedPredictions, classes_of
from models.offline.io.samples import Sample, require_labels
from models.offline.study.defences.states import Reader, States
from models.offline.study.defences.threshold import rejecting, require_enough, threshold_of

Array = NDArray[np.float64]
Method = Literal["badacts", "dan", "dan-mean", "dup", "lcf"]
TINY = 1e-8
"""Floor for standard deviations."""


class CleanTexts(NamedTuple):
    """Clean texts for a detector, each used for one purpose only."""

    known: list[Sample]
    """For statistics."""
    held_back: list[Sample]
    """For the threshold, and for the scale of what is added up."""

    @staticmethod
    def split(samples: Sequence[Sample], seed: int) -> "CleanTexts":
        """Shuffle the distinct texts and split them in half."""
        distinct = list({s.text: s for s in samples}.values())
        random.Random(seed).shuffle(distinct)
        half = len(distinct) // 2
        return CleanTexts(distinct[:half], distinct[half:])


class Suspicion(Protocol):
    """A score of hidden states, fitted to those of clean texts."""

    def __call__(self, states: States) -> Array:
        """Return the suspicion of each text, shape (n,)."""


@dataclass(frozen=True)
class BadActs:
    """The detector of BadActs (Yi et al., ACL Findings 2024): unusual activations of neurons.

    A neuron is a dimension of the token that the classifier reads, after any layer. Its activations
    on clean texts are taken for normal. The neuron activation state (NAS) of a text is the share of
    neurons within `WIDTH` standard deviations of the mean; the suspicion is 1 - NAS.
    """

    means: Array
    """Shape (H - 1, D)."""
    deviations: Array
    """Shape (H - 1, D)."""

    WIDTH = 3.0
    """As in the authors' script for detection."""

    @staticmethod
    def fit(known: States) -> "BadActs":
        """Fit to clean texts."""
        layers = known.read[:, 1:].astype(np.float64)
        return BadActs(layers.mean(0), layers.std(0))

    def __call__(self, states: States) -> Array:
        """Return the share of neurons with unusual activations, shape (n,)."""
        away = np.abs(states.read[:, 1:] - self.means)
        outside: Array = (away > self.WIDTH * self.deviations).mean((1, 2))
        return outside


class Gaussian(NamedTuple):
    """Means that share a covariance, which is shrunk, since there may be more dimensions."""

    means: Array
    """Shape (M, D)."""
    precision: Array
    """Inverse covariance, shape (D, D)."""

    @staticmethod
    def fit(points: Array, classes: Classes) -> "Gaussian":
        """Fit a mean for each class with points, shape (n, D), and the covariance around them."""
        own = np.unique(classes)
        means = np.stack([points[classes == one].mean(0) for one in own])
        away = points - means[np.searchsorted(own, classes)]
        return Gaussian(means, ShrunkCovariance().fit(away).precision_)

    def squared_distances(self, points: Array) -> Array:
        """Return squared Mahalanobis distances to the nearest mean, shape (n,)."""
        away = points[:, None] - self.means
        squares = np.einsum("nmd,de,nme->nm", away, self.precision, away, optimize=True)
        nearest: Array = squares.min(1).clip(0)
        return nearest


class Standard(NamedTuple):
    """Standardizes numbers about a text by those of clean texts."""

    mean: Array
    deviation: Array

    @staticmethod
    def fit(clean: Array) -> "Standard":
        """Fit to clean texts, shape (n, ...)."""
        return Standard(clean.mean(0), np.maximum(clean.std(0), TINY))

    def __call__(self, values: Array) -> Array:
        """Return z-scores, of the shape of the values."""
        z: Array = (values - self.mean) / self.deviation
        return z


@dataclass(frozen=True)
class Dan:
    """DAN (Chen et al., EMNLP Findings 2022): distances to the classes' clean texts by layer.

    A layer's distance is the squared Mahalanobis distance of a state to the nearest class. It is
    standardized by clean texts, and averaged over the layers. The state is that of the token that
    the classifier reads, or, by default in the authors' code, the mean over all tokens.
    """

    of_mean: bool
    """Whether the state is the mean over all tokens."""
    layers: tuple[Gaussian, ...]
    scale: Standard
    """Of the layers' distances, shape (H - 1,)."""

    @staticmethod
    def fit(known: States, classes: Classes, held_back: States, *, of_mean: bool) -> "Dan":
        """Fit the classes to labelled clean texts, and the scale to others."""
        points = (known.mean if of_mean else known.read).astype(np.float64)
        layers = [Gaussian.fit(points[:, i], classes) for i in range(1, points.shape[1])]
        bare = Dan(of_mean, tuple(layers), Standard(np.zeros(1), np.ones(1)))
        return replace(bare, scale=Standard.fit(bare.distances(held_back)))

    def distances(self, states: States) -> Array:
        """Return the distance to the nearest class by layer, shape (n, H - 1)."""
        points = (states.mean if self.of_mean else states.read).astype(np.float64)
        by_layer = [own.squared_distances(points[:, i]) for i, own in enumerate(self.layers, 1)]
        return np.stack(by_layer, 1)

    def __call__(self, states: States) -> Array:
        """Return the mean standardized distance, shape (n,)."""
        means: Array = self.scale(self.distances(states)).mean(1)
        return means


@dataclass(frozen=True)
class Dup:
    """The detector of DUP (Hu et al., arXiv 2508.01647): distances, and changes between layers.

    Both are of the token that the classifier reads, standardized by clean texts, and weighted. The
    first is its Mahalanobis distance to all clean texts, whatever their class, averaged over the
    `LAYERS` layers that separate the classes best by the index of Calinski and Harabasz. The second
    is the share of the largest singular value in the matrix of differences between layers.
    """

    layers: dict[int, Gaussian]
    """By index into the states."""
    scale: Standard
    """Of both parts, shape (2,)."""

    LAYERS = 3
    WEIGHT = 0.9
    """Weight of the first part: with it, the number of layers, and the rest, as in the code."""

    @staticmethod
    def fit(known: States, classes: Classes, held_back: States) -> "Dup":
        """Fit the distances to labelled clean texts, and the scale to others."""
        points = known.read.astype(np.float64)
        indices = range(1, points.shape[1])
        separation = [calinski_harabasz_score(points[:, i], classes) for i in indices]
        best = sorted(indices, key=lambda i: -separation[i - 1])[: Dup.LAYERS]
        layers = {i: Gaussian.fit(points[:, i], np.zeros_like(classes)) for i in best}
        bare = Dup(layers, Standard(np.zeros(2), np.ones(2)))
        return replace(bare, scale=Standard.fit(bare.parts(held_back)))

    def parts(self, states: States) -> Array:
        """Return the mean distance, and the share of the largest singular value, shape (n, 2)."""
        points = states.read.astype(np.float64)
        squares = [own.squared_distances(points[:, i]) for i, own in self.layers.items()]
        values = np.linalg.svd(np.diff(points[:, 1:], axis=1), compute_uv=False)
        return np.stack([np.sqrt(squares).mean(0), values[:, 0] / values.sum(1).clip(TINY)], 1)

    def __call__(self, states: States) -> Array:
        """Return the weighted sum of both parts, shape (n,)."""
        score: Array = self.scale(self.parts(states)) @ np.array([self.WEIGHT, 1 - self.WEIGHT])
        return score


@dataclass(frozen=True)
class Lcf:
    """Layerwise convergence fingerprints (Min et al., arXiv 2604.24542): unusual steps of layers.

    A step is what a layer adds to the token that the classifier reads. Its size is the norm of its
    z-scores. The suspicion is the Mahalanobis distance of the standardized sizes of all layers, by
    a covariance after Ledoit and Wolf.
    """

    steps: Standard
    """Of the steps, shape (H - 1, D)."""
    sizes: Standard
    """Of their sizes, shape (H - 1,)."""
    precision: Array
    """Inverse covariance of the standardized sizes, shape (H - 1, H - 1)."""

    @staticmethod
    def fit(known: States) -> "Lcf":
        """Fit to clean texts."""
        steps = np.diff(known.read.astype(np.float64), axis=1)
        of_steps = Standard.fit(steps)
        sizes = np.linalg.norm(of_steps(steps), axis=2)
        of_sizes = Standard.fit(sizes)
        return Lcf(of_steps, of_sizes, LedoitWolf().fit(of_sizes(sizes)).precision_)

    def __call__(self, states: States) -> Array:
        """Return the distance from clean texts, shape (n,)."""
        steps = np.diff(states.read.astype(np.float64), axis=1)
        # The mean of standardized sizes is 0.
        sizes = self.sizes(np.linalg.norm(self.steps(steps), axis=2))
        distances: Array = np.sqrt(np.einsum("nh,hk,nk->n", sizes, self.precision, sizes))
        return distances


def fit_suspicion(method: Method, known: States, classes: Classes, held_back: States) -> Suspicion:
    """Fit the score of a method to clean texts.

    Args:
        method: which one.
        known: texts for statistics.
        classes: their classes, shape (n,).
        held_back: texts for the scale of what is added up.
    """
    match method:
        case "badacts":
            return BadActs.fit(known)
        case "dan" | "dan-mean":
            return Dan.fit(known, classes, held_back, of_mean=method == "dan-mean")
        case "dup":
            return Dup.fit(known, classes, held_back)
        case "lcf":
            return Lcf.fit(known)


@dataclass(frozen=True)
class StateDetector:
    """A defence that rejects texts by their hidden states."""

    suspicion: Suspicion
    threshold: float
    """Texts with at least this score are rejected."""

    @staticmethod
    def fit(
        method: Method,
        clean: CleanTexts,
        read: Reader,
        labels: Sequence[str],
        frr_budget: float,
    ) -> "StateDetector":
        """Fit a score to clean texts, and choose the threshold by the same rule as for PSIM.

        Args:
            method: how texts are scored.
            clean: texts with labels.
            read: the victim.
            labels: its classes, in order.
            frr_budget: tolerated share of rejected clean texts, in (0, 1).

        Raises:
            DataError: a text has no label or an unknown one, or all texts have the same label.
            CalibrationError: there are too few texts for the budget.
        """
        require_labels(clean.known, labels)
        require_enough(len(clean.held_back), frr_budget)
        known, held_back = (read([s.text for s in part]) for part in clean)
        suspicion = fit_suspicion(method, known, classes_of(clean.known, labels), held_back)
        bare = StateDetector(suspicion, math.inf)
        return replace(bare, threshold=threshold_of(bare.scores(held_back), frr_budget))

    def scores(self, states: States) -> FloatArray:
        """Return the suspicion of each text, shape (n,)."""
        return self.suspicion(states).astype(np.float32)

    def defend(self, texts: Sequence[str], read: Reader) -> DefendedPredictions:
        """Classify the texts, and reject the suspicious ones, from the same pass."""
        states = read(texts)
        scores = self.scores(states)
        return rejecting(states.probabilities.argmax(1), scores, self.threshold)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the number of extra passes of the victim per text: its own has the states."""
        return 0.0
