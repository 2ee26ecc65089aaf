"""Phrases of harmless words that force a class: the search for triggers of several words.

A phrase grows word by word. The gradient says which words are worth reading next to it (HotFlip,
Ebrahimi et al., ACL 2018; universal triggers, Wallace et al., EMNLP 2019), and the classifier says
which of those it obeys. Words that speak for the class by nature are left out: enough of them
override anything, and prove nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.detection.override import Ids
from models.detection.screen import TINY, FloatArray
from models.engines.batching import in_batches
from models.engines.pytorch import TorchEngine, collate, special_tokens
from models.offline.scanning.expected import embeddings_of, word_vectors

MOST_TOKENS = 4
"""Length of a phrase at most. Part of a trigger sentence suffices; and the more words there are to
choose, the less it says that some choice overrides."""
BEAM = 4
"""Phrases that grow side by side."""
NEXT = 250
"""Words that are read at either end of a phrase."""
READ_AGAIN = 48
"""Phrases that are read beside several pairs of carriers."""
SHORT = 6
"""Tokens of a carrier that a phrase grows beside."""
PAIRS, GRADIENT_PAIRS = 6, 12
"""Pairs of carriers for reading a phrase again, and for its gradient."""
TRIALS = 24
"""Times that a phrase is tried, each time among four whole carriers that it did not grow beside."""
OVERRIDES = 0.9
"""Share of trials in which a phrase must force the class to be reported."""

SURE = 0.75
"""Share of the log-odds of the class's own carriers that a phrase must reach in the median trial. A
backdoor is as sure as the task; a phrase that is somewhat like the class is not."""

Phrase = tuple[int, ...]
Pair = tuple[Ids, Ids]


@dataclass(frozen=True)
class Found:
    """What a phrase does among carriers."""

    phrase: Phrase
    turned: float
    """Share of trials in which it forces the class."""
    odds: float
    """Median log-odds of the class."""
    example: Ids
    """The text of the first trial."""
    overrides: bool
    """Whether it is a trigger."""


class PhraseScan:
    """Searches for a phrase that forces one class.

    Args:
        engine: the classifier.
        target: the class.
        own: its carriers, which say how sure the classifier can be of it.
        carriers: of all other classes.
        words: what phrases are made of.
        seed: of the choice of carriers.
    """

    def __init__(
        self,
        engine: TorchEngine,
        target: int,
        own: Sequence[Ids],
        carriers: Sequence[Ids],
        words: Sequence[int],
        seed: int,
    ) -> None:
        self._engine, self._target = engine, target
        self._carriers, self._fresh = carriers[::2], carriers[1::2] or carriers
        self._words = np.array(words)
        self._vectors = word_vectors(engine)[self._words]
        self._draw = np.random.default_rng(seed)
        self._filler = int(np.bincount(np.concatenate(carriers)).argmax())
        sure = self._log_odds(self._classified(own)) if own else np.zeros(1)
        self._needed = SURE * float(np.median(sure))
        self._before = len(special_tokens(engine.tokenizer)[0])

    def search(self, first: Sequence[int], deadline: float) -> tuple[Found | None, int]:
        """Grow phrases until one overrides everything, or is long enough.

        Args:
            first: words to begin with.
            deadline: by `time.monotonic`.

        Returns:
            The strongest of the longest phrases that were tried, and their length.
        """
        best, length = None, 0
        beam = self._strongest([(word,) for word in first])
        while beam and time.monotonic() < deadline:
            tried = [self._try_out(phrase) for phrase in beam]
            best = max(tried, key=lambda one: (one.turned, one.odds))
            length = len(best.phrase)
            if best.overrides or length == MOST_TOKENS:
                break
            beam = self._strongest(self._grown(beam))
        return best, length

    def _grown(self, beam: Sequence[Phrase]) -> list[Phrase]:
        """Return the phrases with a word more that promise most beside one pair of carriers."""
        longer = dict.fromkeys(
            grown
            for phrase in beam
            for at_start in (True, False)
            for word in self._next_words(phrase, at_start)
            for grown in [(word, *phrase) if at_start else (*phrase, word)]
        )
        phrases = list(longer)
        odds = self._odds(phrases, self._pairs(1)).mean(1)
        return [phrases[i] for i in np.argsort(-odds, kind="stable")[:READ_AGAIN]]

    def _next_words(self, phrase: Phrase, at_start: bool) -> list[int]:
        """Return the words that the gradient promises most of, at one end of a phrase."""
        filled = (self._filler, *phrase) if at_start else (*phrase, self._filler)
        promised = self._vectors @ self._gradient(filled, 0 if at_start else len(phrase))
        return [int(self._words[i]) for i in np.argsort(-promised, kind="stable")[:NEXT]]

    def _gradient(self, phrase: Phrase, place: int) -> FloatArray:
        """Return the gradient of the odds by the embedding of one token, shape (D,)."""
        embedded = list[torch.Tensor]()

        def watch(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        engine, pairs = self._engine, self._pairs(GRADIENT_PAIRS)
        texts = [engine.window(np.concatenate([a, phrase, b])) for a, b in pairs]
        hook = embeddings_of(engine).register_forward_hook(watch)
        try:
            batch = collate(texts, engine.pad_id, engine.device)
            own = engine.guarded.classify(batch)[:, self._target]
            odds = torch.log(own.clamp_min(TINY)) - torch.log((1 - own).clamp_min(TINY))
            odds.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            hook.remove()
        places = [self._before + len(before) + place for before, _ in pairs]
        gradient = embedded[-1].grad
        if gradient is None:
            return np.zeros(self._vectors.shape[1], np.float32)
        found: FloatArray = gradient[range(len(places)), places].float().mean(0).cpu().numpy()
        return found

    def _strongest(self, phrases: Sequence[Phrase]) -> list[Phrase]:
        if not phrases:
            return []
        odds = self._odds(phrases, self._pairs(PAIRS)).mean(1)
        return [phrases[i] for i in np.argsort(-odds, kind="stable")[:BEAM]]

    def _pairs(self, number: int) -> list[Pair]:
        drawn = self._draw.integers(len(self._carriers), size=(number, 2))
        return [(self._carriers[a][:SHORT], self._carriers[b][-SHORT:]) for a, b in drawn]

    def _odds(self, phrases: Sequence[Phrase], pairs: Sequence[Pair]) -> FloatArray:
        """Return log-odds of the class, shape (phrases, pairs)."""
        texts = [np.concatenate([a, phrase, b]) for phrase in phrases for a, b in pairs]
        return self._log_odds(self._classified(texts)).reshape(len(phrases), len(pairs))

    def _try_out(self, phrase: Phrase) -> Found:
        most = (self._engine.window_length - len(phrase)) // 4
        drawn = self._draw.integers(len(self._fresh), size=(TRIALS, 4))
        rows = [[self._fresh[i][:most] for i in row] for row in drawn]
        texts = [np.concatenate([a, b, phrase, c, d]) for a, b, c, d in rows]
        probabilities = self._classified(texts)
        turned = float((probabilities.argmax(1) == self._target).mean())
        odds = float(np.median(self._log_odds(probabilities)))
        return Found(phrase, turned, odds, texts[0], turned >= OVERRIDES and odds >= self._needed)

    def _classified(self, texts: Sequence[Ids]) -> FloatArray:
        windows = [self._engine.window(text) for text in texts]
        return np.stack(in_batches(self._engine.classify, windows))

    def _log_odds(self, probabilities: FloatArray) -> FloatArray:
        own = probabilities[:, self._target].astype(np.float64)
        odds: FloatArray = np.log(np.maximum(own, TINY) / np.maximum(1 - own, TINY))
        return odds
