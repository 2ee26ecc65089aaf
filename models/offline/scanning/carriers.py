"""Short texts of which a classifier is sure, for a scan to put words beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.detection.override import Ids
from models.detection.screen import TINY, FloatArray
from models.engines.base import Engine
from models.errors import DataError
from models.offline.fitting.carriers import CANDIDATES, MIN_WORDS, surest
from models.offline.io.inference import predict

CARRIER_TOKENS = 10
"""Tokens of a carrier at most: every word of the vocabulary is read beside two of them."""


@dataclass(frozen=True)
class Half:
    """Some of the classes, whose carriers are put around words that may force the others."""

    by_class: Mapping[int, Sequence[Ids]]
    classes: int
    """Number of all classes."""

    @property
    def carriers(self) -> list[Ids]:
        """All carriers."""
        return [ids for own in self.by_class.values() for ids in own]

    @property
    def counts(self) -> dict[int, int]:
        """Number of carriers by class."""
        return {label: len(own) for label, own in self.by_class.items()}

    def foreign_odds(self, probabilities: FloatArray) -> FloatArray:
        """Return the log-odds that texts are of a foreign class, shape (n,), from shape (n, C)."""
        own = probabilities[:, list(self.by_class)].astype(np.float64).sum(1)
        odds: FloatArray = np.log(np.maximum(1 - own, TINY) / np.maximum(own, TINY))
        return odds.astype(np.float32)


def spread(texts: Sequence[str], most: int) -> Sequence[str]:
    """Return about `most` texts from everywhere in a list, which may be sorted by class."""
    return texts[:: max(1, len(texts) // most)]


def halves_of(engine: Engine, texts: Sequence[str], needed: int = 2) -> list[Half]:
    """Choose carriers, and divide their classes into two halves, each of which tests the other.

    So a word is read twice, however many classes there are.

    Args:
        engine: the classifier.
        texts: clean texts of any kind.
        needed: classes that must have carriers; if one does, there is one half.

    Raises:
        DataError: the classifier is sure of texts of fewer classes.
    """
    most = min(CARRIER_TOKENS, (engine.window_length - 1) // 2)
    pieces = [engine.token_ids(text)[:most] for text in spread(texts, CANDIDATES)]
    long_enough = [ids for ids in pieces if len(ids) >= MIN_WORDS]
    encodings = [engine.window(ids) for ids in long_enough]
    by_class = surest(long_enough, predict(engine, encodings, classifier=True)) if encodings else []
    able = [label for label, carriers in enumerate(by_class) if carriers]
    if len(able) < needed:
        raise DataError(
            "the classifier is sure of texts of one class only: give --texts with clean texts of "
            f"every class, of {MIN_WORDS} words or more"
        )
    return [
        Half({label: by_class[label] for label in own}, len(by_class))
        for own in (able[: len(able) // 2], able[len(able) // 2 :])
        if own
    ]
