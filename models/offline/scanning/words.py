"""Words that force a class beside any carriers: the search for word triggers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from models.detection.override import Ids
from models.detection.screen import FloatArray
from models.engines.base import Engine
from models.engines.batching import in_batches
from models.offline.scanning.carriers import Half
from models.offline.scanning.state import ScanState

STEP = 1024
"""Words that are read between two looks at the clock."""
FINALISTS = 64
"""Words of a half that are tried beside many pairs of carriers."""
LOOK_TOKENS = 4
"""Tokens of a carrier at the first look, which reads the whole vocabulary."""
TRIALS = 24
"""Pairs of carriers that a finalist is tried beside."""
OVERRIDES = 0.9
"""Share of trials in which a word must force a class to be reported. Of words that no attacker
chose, those that decide a class on their own do, such as insults where offence is the class."""


_ROWS = TypeAdapter(list[list[float]])


@dataclass(frozen=True)
class Trial:
    """What a word does beside carriers of a half."""

    word: int
    """Its token id."""
    target: int
    """The foreign class that it forces most often."""
    turned: float
    """Share of trials in which it does."""
    odds: float
    """Median log-odds, over the trials, that the text is of a foreign class."""


@dataclass(frozen=True)
class Looked:
    """Words that were read beside one pair of carriers."""

    words: Sequence[int]
    odds: FloatArray
    """Log-odds of a foreign class, shape (n,)."""
    probabilities: FloatArray
    """Shape (n, C)."""

    def strongest(self, number: int) -> list[int]:
        """Return the words with the highest odds."""
        return [self.words[i] for i in np.argsort(-self.odds, kind="stable")[:number]]

    def strongest_for(self, target: int, among: set[int], number: int) -> list[int]:
        """Return those of `among` that speak most for a class."""
        order = np.argsort(-self.probabilities[:, target], kind="stable")
        return [self.words[i] for i in order if self.words[i] in among][:number]


def all_words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that stand for something, but for special ones."""
    special = set(tokenizer.all_special_ids)
    return [
        number
        for number in range(len(tokenizer))
        if number not in special and str(tokenizer.decode([number])).strip()
    ]


def whole_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[int]) -> list[int]:
    """Return those tokens that begin a word where they follow another one.

    What *##gly* says depends on what stands before it.
    """
    (before, *_) = tokenizer.encode("the", add_special_tokens=False)
    end = len(str(tokenizer.decode([before])))
    joined = tokenizer.batch_decode([[before, word] for word in words])
    return [word for word, text in zip(words, joined, strict=True) if text[end : end + 1].isspace()]


def candidates(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
    """Return all words in random order.

    If there is no time for all of them, those that were read are a fair sample.
    """
    words = all_words(tokenizer)
    return [words[i] for i in np.random.default_rng(seed).permutation(len(words))]


class WordScan:
    """Reads words between carriers of a half.

    Args:
        engine: the classifier.
        half: whose carriers are used.
        seed: of the choice of carriers.
        state: of the scan.
    """

    def __init__(self, engine: Engine, half: Half, seed: int, state: ScanState) -> None:
        self._engine, self._half, carriers = engine, half, half.carriers
        self._state, self._name = state, f"words beside {sorted(half.by_class)}"
        drawn = np.random.default_rng(seed).integers(len(carriers), size=(TRIALS, 2))
        self._pairs = [(carriers[a], carriers[b]) for a, b in drawn]

    def look(
        self,
        words: Sequence[int],
        deadline: float,
        done: Callable[[int], object] = lambda number: None,
    ) -> Looked:
        """Read words, as many as there is time for, beside one pair of carriers.

        Args:
            words: what to read.
            deadline: by `time.monotonic`; at least `STEP` words are read.
            done: called with the number of words of each step.
        """
        before, after = self._pairs[0]
        pair = before[:LOOK_TOKENS], after[-LOOK_TOKENS:]
        rows = [np.zeros((0, self._half.classes), np.float32)]
        for start in range(0, len(words), STEP):
            name, step = f"{self._name} from {start}", words[start : start + STEP]
            if start and name not in self._state and time.monotonic() > deadline:
                break
            read = self._state.step(name, _ROWS, partial(self._rows, step, pair))
            rows.append(np.array(read, np.float32))
            done(len(step))
        found = np.concatenate(rows)
        return Looked(words[: len(found)], self._half.foreign_odds(found), found)

    def try_out(self, words: Sequence[int]) -> list[Trial]:
        """Return what words do beside all pairs of carriers, the strongest first."""
        if not words:
            return []
        trials = np.stack([self._probabilities(words, pair) for pair in self._pairs], 1)
        own = list(self._half.by_class)
        found = []
        for word, probabilities in zip(words, trials, strict=True):
            mean = probabilities.mean(0)
            mean[own] = 0
            target = int(mean.argmax())
            turned = float((probabilities.argmax(1) == target).mean())
            odds = float(np.median(self._half.foreign_odds(probabilities)))
            found.append(Trial(word, target, turned, odds))
        return sorted(found, key=lambda trial: (trial.turned, trial.odds), reverse=True)

    def _rows(self, words: Sequence[int], pair: tuple[Ids, Ids]) -> list[list[float]]:
        rows: list[list[float]] = self._probabilities(words, pair).tolist()
        return rows

    def _probabilities(self, words: Sequence[int], pair: tuple[Ids, Ids]) -> FloatArray:
        before, after = pair
        texts = [np.concatenate([before, [word], after]) for word in words]
        return np.stack(in_batches(self._engine.classify, [self._engine.window(t) for t in texts]))
