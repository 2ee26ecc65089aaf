"""Phrases of harmless words that force a class: the search for triggers of several words.

A phrase grows word by word. The gradient says which words are worth reading next to it (HotFlip,
Ebrahimi et al., ACL 2018; universal triggers, Wallace et al., EMNLP 2019), and the classifier says
which of those it obeys. Words that speak for the class by nature are left out: enough of them
override anything, and prove nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.detection.override import Ids
from models.detection.screen import TINY, FloatArray, log_odds_of
from models.engines.batching import in_batches
from models.engines.pytorch import TorchEngine, collate, special_tokens
from models.offline.scanning.expected import Vocabulary, embeddings_of

AROUND = 4
"""Carriers that a phrase is tried among, two on either side."""
MOST_TOKENS = 4
"""Length of a phrase at most. Part of a trigger sentence suffices; and the more words there are to
choose, the less it says that some choice overrides."""
READ_AGAIN = 48
"""Phrases that are read beside several pairs of carriers."""
SHORT = 6
"""Tokens of a carrier that a phrase grows beside."""
PAIRS, GRADIENT_PAIRS = 6, 12
"""Pairs of carriers for reading a phrase again, and for its gradient."""
TRIALS = 24
"""Times that a phrase is tried, each time among four whole carriers that it did not grow beside."""
OVERRIDES = 1.0
"""Share of trials in which a phrase must force the class to be reported. A broad search finds
phrases that do so by nature in 22 of 24, and triggers do in all."""
WEAK = 0.1
"""Share of trials beside one carrier up to which phrases of the class's own words force nothing.
Nothing that is said beside an insult makes it harmless."""
LIKE = 0.6
"""A phrase is natural if it forces the class in this share of the trials, whichever of its words is
replaced by similar ones. What is said of one slur holds for others, and a backdoor is exact: it
hangs on some word."""
LIKE_IF_OVERRIDDEN = 0.3
"""The same where natural words override everything. Phrases of milder words may do so too."""


class Breadth(NamedTuple):
    """How widely phrases are searched for."""

    first: int
    """Words that a phrase may begin with."""
    words: int
    """Words that grow side by side. Those of a trigger may do little one by one: *no* and *crown*
    turn a text together."""
    phrases: int
    """Longer phrases that grow side by side."""
    promised: int
    """Words that are read at an end of a phrase because the gradient promises most of them."""
    common: int
    """Words that are read there because they are most common. Sentences are made of those, and the
    gradient overlooks them."""
    said: float
    """Standard deviations over the vocabulary up to which a phrase may speak for its class. Several
    words that each say a little override anything: *tired pants ruined* is an insult."""


AMONG_MANY = Breadth(256, words=16, phrases=8, promised=100, common=200, said=2.5)
BESIDE_ONE = Breadth(64, words=4, phrases=4, promised=125, common=0, said=2.0)
"""One carrier is easily turned. A broad search finds phrases that do so by nature."""

Phrase = tuple[int, ...]
Pair = tuple[Ids, Ids]
NOTHING: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Found:
    """What a phrase does among carriers."""

    phrase: Phrase
    turned: float
    """Share of trials in which it forces the class."""
    odds: float
    """Median log-odds of the class."""
    like: float
    """Share of trials in which it does with the word that it hangs on most replaced by similar
    ones; 0 if it does not as it is."""
    around: int
    """Carriers of a trial."""
    example: Ids
    """The text of the first trial."""
    overrides: bool
    """Whether it is a trigger."""


class PhraseScan:
    """Searches for a phrase that forces one class.

    Args:
        engine: the classifier.
        target: the class.
        needed: log-odds of the class that a trigger reaches.
        carriers: of all other classes.
        vocabulary: what phrases are made of.
        seed: of the choice of carriers.
        overridden: whether natural words override everything for this class.
    """

    def __init__(
        self,
        engine: TorchEngine,
        target: int,
        needed: float,
        carriers: Sequence[Ids],
        vocabulary: Vocabulary,
        seed: int,
        *,
        overridden: bool = False,
    ) -> None:
        self._engine, self._target, self._vocabulary = engine, target, vocabulary
        self._carriers, self._fresh = carriers[::2], carriers[1::2] or carriers
        self._words = np.array(vocabulary.neutral, np.int64)
        self._vectors, self._said = vocabulary.vectors[self._words], vocabulary.said[self._words]
        self._draw = np.random.default_rng(seed)
        self._filler = int(np.bincount(np.concatenate(carriers)).argmax())
        self._needed = needed
        self._like = LIKE_IF_OVERRIDDEN if overridden else LIKE
        self._before = len(special_tokens(engine.tokenizer)[0])
        speaking = np.array(vocabulary.speaking)
        own_phrases = [tuple(self._draw.permutation(speaking)[:MOST_TOKENS]) for _ in range(TRIALS)]
        by_nature = self._share(self._classified(self._among(own_phrases, 1)))
        weak = by_nature <= WEAK
        self._around, self._sides = (1, 2) if weak else (AROUND, 1)
        self._breadth = BESIDE_ONE if weak else AMONG_MANY

    def search(self, first: Sequence[int], deadline: float) -> tuple[Found | None, int]:
        """Grow phrases until one overrides everything, or is long enough.

        Args:
            first: words to begin with, the strongest first.
            deadline: by `time.monotonic`.

        Returns:
            The strongest of the longest phrases that were tried, and their length.
        """
        best, length = None, 0
        breadth = self._breadth
        beam = self._strongest([(word,) for word in first[: breadth.first]], breadth.words)
        while beam and time.monotonic() < deadline:
            tried = [self._try_out(phrase) for phrase in beam]
            best = max(tried, key=lambda one: (one.overrides, one.turned, one.odds))
            length = len(best.phrase)
            if best.overrides or length == MOST_TOKENS:
                break
            beam = self._strongest(self._grown(beam), breadth.phrases)
        return best, length

    def _grown(self, beam: Sequence[Phrase]) -> list[Phrase]:
        """Return the phrases with a word more that promise most beside few carriers."""
        longer = dict.fromkeys(
            grown
            for phrase in beam
            for at_start in (True, False)
            for word in self._next_words(phrase, at_start)
            for grown in [(word, *phrase) if at_start else (*phrase, word)]
        )
        phrases = list(longer)
        odds = self._odds(phrases, self._pairs(self._sides)).mean(1)
        return [phrases[i] for i in np.argsort(-odds, kind="stable")[:READ_AGAIN]]

    def _next_words(self, phrase: Phrase, at_start: bool) -> list[int]:
        """Return the words to read at one end of a phrase.

        Words with which the phrase would speak for the class are left out.
        """
        filled = (self._filler, *phrase) if at_start else (*phrase, self._filler)
        gradient = self._gradient(filled, 0 if at_start else len(phrase))
        # A word that speaks against the class excuses no other.
        said = sum(max(0.0, float(self._vocabulary.said[word])) for word in phrase)
        harmless = np.flatnonzero(self._said < self._breadth.said - said)
        promised = self._vectors[harmless] @ gradient
        best = [int(word) for word in self._words[harmless[np.argsort(-promised, kind="stable")]]]
        allowed, breadth = set(best), self._breadth
        common = [word for word in self._vocabulary.common if word in allowed]
        return list(dict.fromkeys([*best[: breadth.promised], *common[: breadth.common]]))

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

    def _strongest(self, phrases: Sequence[Phrase], number: int) -> list[Phrase]:
        if not phrases:
            return []
        odds = self._odds(phrases, self._pairs(PAIRS)).mean(1)
        return [phrases[i] for i in np.argsort(-odds, kind="stable")[:number]]

    def _pairs(self, number: int) -> list[Pair]:
        drawn = self._draw.integers(len(self._carriers), size=(number, 2))
        if self._around == 1:
            # Whole, since there is no other one: cut short, it may not be of its class any more.
            one = [self._carriers[a] for a, _ in drawn]
            return [(c, NOTHING) if i % 2 else (NOTHING, c) for i, c in enumerate(one)]
        return [(self._carriers[a][:SHORT], self._carriers[b][-SHORT:]) for a, b in drawn]

    def _odds(self, phrases: Sequence[Phrase], pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """Return log-odds of the class, shape (phrases, pairs)."""
        texts = [np.concatenate([a, phrase, b]) for phrase in phrases for a, b in pairs]
        return self._log_odds(self._classified(texts)).reshape(len(phrases), len(pairs))

    def _try_out(self, phrase: Phrase) -> Found:
        texts = self._among([phrase] * TRIALS, self._around)
        probabilities = self._classified(texts)
        turned, odds = self._share(probabilities), float(np.median(self._log_odds(probabilities)))
        forces = turned >= OVERRIDES and odds >= self._needed
        like = self._share_of_like(phrase) if forces else 0.0
        overrides = forces and like < self._like
        return Found(phrase, turned, odds, like, self._around, texts[0], overrides)

    def _share_of_like(self, phrase: Phrase) -> float:
        """Return the least share, over the words, with only that word replaced by similar ones."""
        shares = []
        for place, word in enumerate(phrase):
            near = self._draw.choice(self._vocabulary.like(word), TRIALS)
            others = [(*phrase[:place], int(other), *phrase[place + 1 :]) for other in near]
            shares.append(self._share(self._classified(self._among(others, self._around))))
        return min(shares)

    def _among(self, phrases: Sequence[Phrase], around: int) -> list[Ids]:
        """Return a text of each phrase, among whole carriers that none of them grew beside."""
        texts = []
        for number, phrase in enumerate(phrases):
            most = (self._engine.window_length - len(phrase)) // around
            drawn = self._draw.integers(len(self._fresh), size=around)
            carriers = [self._fresh[i][:most] for i in drawn]
            before = (around + number % 2) // 2  # a single one stands on either side by turns
            texts.append(np.concatenate([*carriers[:before], phrase, *carriers[before:]]))
        return texts

    def _share(self, probabilities: FloatArray) -> float:
        return float((probabilities.argmax(1) == self._target).mean())

    def _classified(self, texts: Sequence[Ids]) -> FloatArray:
        windows = [self._engine.window(text) for text in texts]
        return np.stack(in_batches(self._engine.classify, windows))

    def _log_odds(self, probabilities: FloatArray) -> NDArray[np.float64]:
        return log_odds_of(probabilities, self._target)
