"""Defences from the literature that PSIM is compared with: ONION and STRIP."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import entr

from models.detection.screen import FloatArray
from models.errors import DataError
from models.offline.evaluation.metrics import DefendedPredictions, classes_of
from models.offline.io.samples import Sample, require_labels
from models.offline.study.defences.language_model import LanguageModel, perplexities
from models.offline.study.defences.threshold import rejecting, require_enough, threshold_of

Classifier = Callable[[Sequence[str]], FloatArray]
"""Function from texts to probabilities, shape (len(texts), C)."""

QUANTILES = np.r_[0:0.9:0.05, 0.9:1:0.005]
"""Quantiles of clean words' suspicion that ONION tries as thresholds; dense where few are lost."""


@dataclass(frozen=True)
class Onion:
    """ONION (Qi et al., EMNLP 2021, section 3): removal of words that a language model finds odd.

    The suspicion of a word is the decrease of the text's perplexity without it (equation 1). Every
    word is judged, including the last one. The only word of a text has suspicion 0.
    """

    lm: LanguageModel
    threshold: float
    """Words with at least this suspicion are removed. Infinity if every removal costs too much."""

    @staticmethod
    def fit(
        lm: LanguageModel,
        dev: Sequence[Sample],
        classify: Classifier,
        labels: Sequence[str],
        max_accuracy_loss: float = 0.02,
    ) -> "Onion":
        """Choose the lowest threshold that preserves the accuracy on clean texts.

        Args:
            lm: language model for the perplexity.
            dev: clean texts with labels.
            classify: the victim.
            labels: the victim's classes, in order.
            max_accuracy_loss: tolerated loss of accuracy on `dev`, in [0, 1].

        Raises:
            DataError: a text has no label or an unknown one, or all texts have the same label.
        """
        require_labels(dev, labels)
        texts, truth = [s.text for s in dev], classes_of(dev, labels)
        suspicions = Onion(lm, math.inf).suspicions(texts)

        def correct(threshold: float) -> int:
            cleaned = _cleaned(texts, suspicions, threshold)
            return int((classify(cleaned).argmax(1) == truth).sum())

        needed = correct(math.inf) - math.floor(max_accuracy_loss * len(dev) + 1e-9)
        words = np.concatenate(suspicions)
        candidates = [float(np.quantile(words, share)) for share in QUANTILES]
        return Onion(lm, next((t for t in candidates if correct(t) >= needed), math.inf))

    def suspicions(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return the suspicion of every word, a difference of perplexities: (words,) per text."""
        variants = [_variants(text) for text in texts]
        flat = perplexities(self.lm, [variant for group in variants for variant in group])
        ends = np.cumsum([len(group) for group in variants])
        return [group[0] - group[1:] for group in np.split(flat, ends)[:-1]]

    def clean(self, texts: Sequence[str]) -> list[str]:
        """Return the texts without their suspicious words; each keeps at least one word."""
        return _cleaned(texts, self.suspicions(texts), self.threshold)

    def defend(self, texts: Sequence[str], classify: Classifier) -> DefendedPredictions:
        """Classify the cleaned texts. No text is rejected; its score is the largest suspicion."""
        suspicions = self.suspicions(texts)
        cleaned = _cleaned(texts, suspicions, self.threshold)
        scores = np.array([words.max() for words in suspicions], np.float32)
        return DefendedPredictions(classify(cleaned).argmax(1), None, scores)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the mean number of language-model passes per text, one more than its words."""
        return float(np.mean([len(_variants(text)) for text in texts]))


def _words(text: str) -> list[str]:
    """Return the words of a text; an empty text has one empty word."""
    return text.split() or [""]


def _variants(text: str) -> list[str]:
    """Return the text, then the text without each of its words; an only word is kept."""
    words = _words(text)
    removed = (words[:i] + words[i + 1 :] or words for i in range(len(words)))
    return [" ".join(kept) for kept in (words, *removed)]


def _cleaned(texts: Sequence[str], suspicions: Sequence[FloatArray], threshold: float) -> list[str]:
    pairs = zip(texts, suspicions, strict=True)
    return [_without(text, by_word, threshold) for text, by_word in pairs]


def _without(text: str, suspicions: FloatArray, threshold: float) -> str:
    """Return the text without the words from `threshold` up, except the least suspicious one."""
    keep = suspicions < threshold
    keep[suspicions.argmin()] = True
    # A text that loses no word keeps its white space too.
    if keep.all():
        return text
    return " ".join(word for word, kept in zip(_words(text), keep, strict=True) if kept)


@dataclass(frozen=True)
class Strip:
    """STRIP (Gao et al., ACSAC 2019; for texts: Gao et al., IEEE TDSC 2021, STRIP-ViTA).

    Copies of a text are mixed with clean texts. A trigger that survives the mixing keeps the victim
    sure of its class. The score is therefore minus the mean entropy, in nats, of the victim's
    predictions on the copies.
    """

    pool: tuple[str, ...]
    """Clean texts whose words are mixed in."""
    threshold: float
    """Texts with at least this score are rejected."""
    copies: int = 10
    seed: int = 0

    @staticmethod
    def fit(
        pool: Sequence[str],
        dev: Sequence[str],
        classify: Classifier,
        frr_budget: float,
        *,
        copies: int = 10,
        seed: int = 0,
    ) -> "Strip":
        """Choose the threshold from clean texts, by the same rule as for PSIM.

        Args:
            pool: clean texts to mix with, none of them in `dev`.
            dev: clean texts for the threshold.
            classify: the victim.
            frr_budget: tolerated share of rejected clean texts, in (0, 1).
            copies: copies of each text.
            seed: seed of the mixing.

        Raises:
            DataError: `pool` is empty.
            CalibrationError: `dev` is too small for the budget.
        """
        if not pool:
            raise DataError("STRIP has no clean texts to mix others with")
        require_enough(len(dev), frr_budget)
        strip = Strip(tuple(pool), math.inf, copies, seed)
        return replace(strip, threshold=threshold_of(strip.scores(dev, classify), frr_budget))

    def mixtures(self, text: str) -> list[str]:
        """Return the mixed copies of a text, which depend only on text, pool and seed.

        Each copy has a random half of its words replaced by the words at the same positions of a
        random clean text, which is repeated if it is too short.
        """
        rng, words = random.Random(f"{self.seed}:{text}"), _words(text)
        mixed = []
        for _ in range(self.copies):
            clean, copy = _words(rng.choice(self.pool)), list(words)
            for position in rng.sample(range(len(words)), max(1, len(words) // 2)):
                copy[position] = clean[position % len(clean)]
            mixed.append(" ".join(copy))
        return mixed

    def scores(self, texts: Sequence[str], classify: Classifier) -> FloatArray:
        """Return minus the mean entropy over the copies of each text, shape (n,), in nats."""
        probabilities = classify([copy for text in texts for copy in self.mixtures(text)])
        entropies = entr(probabilities).sum(1).reshape(len(texts), self.copies)
        scores: FloatArray = -entropies.mean(1).astype(np.float32)
        return scores

    def defend(self, texts: Sequence[str], classify: Classifier) -> DefendedPredictions:
        """Classify the original texts, and reject those with the surest copies."""
        scores = self.scores(texts, classify)
        return rejecting(classify(texts).argmax(1), scores, self.threshold)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the number of extra passes of the victim per text."""
        return float(self.copies)
