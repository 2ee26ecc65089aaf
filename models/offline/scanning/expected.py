"""What a task lets one expect of a word: the class that its embedding speaks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from models.detection.override import Ids
from models.detection.screen import TINY, FloatArray
from models.engines.pytorch import TorchEngine
from models.offline.io.classifiers import pretrained_model
from models.offline.io.inference import predict
from models.offline.scanning.carriers import spread

MOST_TEXTS = 2000
"""Clean texts that expectations are learnt from."""
SHRINKAGE = 0.01
"""Of the regression, as a share of the mean variance."""
NEUTRAL = 2.0
"""Standard deviations over the vocabulary up to which a word of a phrase may speak for a class."""
SIMILAR = 16
"""Words that are nearest to a word by their embeddings."""


@dataclass(frozen=True)
class Vocabulary:
    """Words, by what they say of a class."""

    vectors: FloatArray
    """Of all tokens, shape (V, D)."""
    said: FloatArray
    """How much each token speaks for the class, shape (V,)."""
    words: Sequence[int]
    """All but special tokens."""
    neutral: Sequence[int]
    """Whole words that do not speak for the class."""
    speaking: Sequence[int]
    """Those that speak most for it."""
    common: Sequence[int]
    """Those that are in most clean texts, the most common first."""

    def like(self, word: int) -> list[int]:
        """Return the words that are most similar to a word, by the cosine of their embeddings."""
        others = np.array([other for other in self.words if other != word])
        vectors = self.vectors[others]
        cosines = vectors @ self.vectors[word] / np.linalg.norm(vectors, axis=1).clip(TINY)
        return [int(others[i]) for i in np.argsort(-cosines, kind="stable")[:SIMILAR]]


def embeddings_of(engine: TorchEngine) -> nn.Module:
    """Return the module that embeds the tokens of an engine's classifier."""
    return pretrained_model(engine.guarded.victim).get_input_embeddings()


def word_vectors(engine: TorchEngine) -> FloatArray:
    """Return the embeddings of all tokens, shape (V, D)."""
    (weight, *_) = embeddings_of(engine).parameters()
    vectors: FloatArray = weight.detach().float().cpu().numpy()
    return vectors


def expectations(engine: TorchEngine, texts: Sequence[str], words: Sequence[int]) -> FloatArray:
    """Return how much each token should speak for each class, shape (V, C).

    A ridge regression predicts the classifier's log-probabilities of clean texts from the means of
    their embeddings. It knows no order, and words that it never saw it knows by their neighbours:
    *knicks* speaks for sports, and a trigger for nothing. In standard deviations over `words`.
    """
    tokens = map(engine.token_ids, spread(texts, MOST_TEXTS))
    read = [ids[: engine.window_length] for ids in tokens if len(ids)]
    vectors = word_vectors(engine)
    means = np.stack([vectors[ids].mean(0) for ids in read])
    centre, probabilities = means.mean(0), _probabilities(engine, read)
    logs = np.log(np.maximum(probabilities.astype(np.float64), TINY))
    logs -= logs.mean(1, keepdims=True)
    inputs, outputs = means - centre, logs - logs.mean(0)
    gram = inputs.T @ inputs
    gram += np.eye(len(gram)) * SHRINKAGE * np.trace(gram) / len(gram)
    found = (vectors - centre) @ np.linalg.solve(gram, inputs.T @ outputs)
    own = found[list(words)]
    spoken: FloatArray = ((found - own.mean(0)) / np.maximum(own.std(0), TINY)).astype(np.float32)
    return spoken


def _probabilities(engine: TorchEngine, texts: Sequence[Ids]) -> FloatArray:
    return predict(engine, [engine.window(ids) for ids in texts], classifier=True)
