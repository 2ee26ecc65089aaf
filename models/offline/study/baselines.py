"""Defences that need no training of the victim, against which PSIM is compared: ONION and STRIP."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import entr

from models.detection.conformal import conformal_threshold, min_calibration_size
from models.detection.screen import FloatArray, is_poisoned
from models.errors import CalibrationError, DataError
from models.offline.evaluation.metrics import Defended, classes_of
from models.offline.io.samples import Sample, require_labels
from models.offline.study.language_model import LanguageModel, perplexities

Classifier = Callable[[Sequence[str]], FloatArray]
"""Takes texts, returns probabilities, shape (len(texts), C)."""

QUANTILES = np.r_[0:0.9:0.05, 0.9:1:0.005]
"""Of the suspicion of clean words: thresholds that ONION tries; fine where few words are lost."""


@dataclass(frozen=True)
class Onion:
    """ONION (Qi et al., EMNLP 2021, section 3): words that a language model finds odd are removed.

    The suspicion of a word is by how much the perplexity of the text falls without it (equation 1).
    Every word is judged, the last one too. A text's only word has nothing to be odd in: 0.
    """

    lm: LanguageModel
    threshold: float
    """Words of this suspicion or more are removed; infinite where no removal is affordable."""

    @staticmethod
    def fit(
        lm: LanguageModel,
        dev: Sequence[Sample],
        classify: Classifier,
        labels: Sequence[str],
        max_accuracy_loss: float = 0.02,
    ) -> "Onion":
        """Choose the threshold by clean texts alone: the lowest that leaves them their accuracy.

        Args:
            lm: says how odd a text is.
            dev: clean texts with labels.
            classify: the victim.
            labels: its classes in order.
            max_accuracy_loss: tolerated fall of the accuracy on `dev`, in [0, 1].

        Raises:
            DataError: a text has no label, or one that is not in `labels`, or all have the same.
        """
        require_labels(dev, labels)
        texts, truth = [s.text for s in dev], classes_of(dev, labels)
        suspicions = Onion(lm, math.inf).suspicions(texts)

        def correct(threshold: float) -> int:
            cleaned = _cleaned(texts, suspicions, threshold)
            return int((classify(cleaned).argmax(1) == truth).sum())

        needed = correct(math.inf) - math.floor(max_accuracy_loss * len(dev) + 1e-9)
        every = np.concatenate(suspicions)
        candidates = [float(np.quantile(every, share)) for share in QUANTILES]
        return Onion(lm, next((t for t in candidates if correct(t) >= needed), math.inf))

    def suspicions(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return the suspicion of every word, in perplexity: shape (words,) for each text."""
        variants = [_variants(text) for text in texts]
        flat = perplexities(self.lm, [variant for group in variants for variant in group])
        ends = np.cumsum([len(group) for group in variants])
        return [whole_first[0] - whole_first[1:] for whole_first in np.split(flat, ends)[:-1]]

    def clean(self, texts: Sequence[str]) -> list[str]:
        """Return the texts without their suspicious words; each keeps one word at least."""
        return _cleaned(texts, self.suspicions(texts), self.threshold)

    def defend(self, texts: Sequence[str], classify: Classifier) -> Defended:
        """Classify the cleaned texts; nothing is rejected, the score is the largest suspicion."""
        suspicions = self.suspicions(texts)
        cleaned = _cleaned(texts, suspicions, self.threshold)
        scores = np.array([words.max() for words in suspicions], np.float32)
        return Defended(classify(cleaned).argmax(1), None, scores)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the mean number of passes of the language model per text: its words and one."""
        return float(np.mean([len(_variants(text)) for text in texts]))


def _words(text: str) -> list[str]:
    """Return the words between white space; an empty text is one empty word."""
    return text.split() or [""]


def _variants(text: str) -> list[str]:
    """Return the text, then the text without each of its words; an only word stays."""
    words = _words(text)
    removed = (words[:i] + words[i + 1 :] or words for i in range(len(words)))
    return [" ".join(kept) for kept in (words, *removed)]


def _cleaned(texts: Sequence[str], suspicions: Sequence[FloatArray], threshold: float) -> list[str]:
    pairs = zip(texts, suspicions, strict=True)
    return [_without(text, of_words, threshold) for text, of_words in pairs]


def _without(text: str, suspicions: FloatArray, threshold: float) -> str:
    """Return the text without the words from `threshold` on; the least suspicious one stays."""
    keep = suspicions < threshold
    keep[suspicions.argmin()] = True
    # A text that loses nothing keeps its white space as well.
    if keep.all():
        return text
    return " ".join(word for word, kept in zip(_words(text), keep, strict=True) if kept)


@dataclass(frozen=True)
class Strip:
    """STRIP (Gao et al., ACSAC 2019; for texts: Gao et al., IEEE TDSC 2021, STRIP-ViTA).

    A text is mixed with clean ones. A trigger that survives keeps the victim sure of its class, so
    the score is minus the mean entropy, in nats, of the victim's answers to the text's own copies.
    """

    pool: tuple[str, ...]
    """Clean texts that the strange words come from."""
    threshold: float
    """Texts of this score or more are rejected."""
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
        """Choose the threshold by clean texts alone, as PSIM's is chosen.

        Args:
            pool: clean texts to mix with, none of them in `dev`.
            dev: clean texts, labels not needed.
            classify: the victim.
            frr_budget: tolerated share of rejected clean texts, in (0, 1).
            copies: mixtures per text.
            seed: seed of the mixtures.

        Raises:
            DataError: `pool` is empty.
            CalibrationError: `dev` is too small for the budget.
        """
        if not pool:
            raise DataError("STRIP has no clean texts to mix others with")
        if len(dev) < (needed := min_calibration_size(frr_budget)):
            raise CalibrationError(
                f"{len(dev)} clean texts are too few for a false-rejection budget of {frr_budget}: "
                f"it needs {needed}; give more clean texts or a larger budget"
            )
        strip = Strip(tuple(pool), math.inf, copies, seed)
        return replace(
            strip, threshold=conformal_threshold(strip.scores(dev, classify), frr_budget)
        )

    def mixtures(self, text: str) -> list[str]:
        """Return the text's copies; they depend on nothing but text, pool and seed.

        In each, half of the words, drawn at random, are replaced by those that stand at the same
        place in a random clean text, which begins anew where it is too short.
        """
        rng, words = random.Random(f"{self.seed}:{text}"), _words(text)
        mixed = []
        for _ in range(self.copies):
            strange, copy = _words(rng.choice(self.pool)), list(words)
            for place in rng.sample(range(len(words)), max(1, len(words) // 2)):
                copy[place] = strange[place % len(strange)]
            mixed.append(" ".join(copy))
        return mixed

    def scores(self, texts: Sequence[str], classify: Classifier) -> FloatArray:
        """Return minus the mean entropy over each text's own copies, shape (n,), in nats."""
        probabilities = classify([copy for text in texts for copy in self.mixtures(text)])
        entropies = entr(probabilities).sum(1).reshape(len(texts), self.copies)
        scores: FloatArray = -entropies.mean(1).astype(np.float32)
        return scores

    def defend(self, texts: Sequence[str], classify: Classifier) -> Defended:
        """Classify the texts themselves; those with the surest copies are rejected."""
        scores = self.scores(texts, classify)
        flagged = [is_poisoned(score, self.threshold) for score in scores.tolist()]
        return Defended(classify(texts).argmax(1), np.array(flagged, np.bool_), scores)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the number of passes of the victim per text, beside that which classifies it."""
        return float(self.copies)
