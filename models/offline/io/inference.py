"""Running an engine on many texts, and timing it."""

import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from models.detection.screen import FloatArray
from models.engines.base import Encoding, Engine
from models.engines.batching import BATCH_TOKENS, length_sorted_batches

SPEED_TEXTS, SPEED_BATCH, SPEED_ROUNDS, SPEED_SECONDS = 64, 8, 5, 3.0


def predict(engine: Engine, texts: Sequence[Encoding], *, classifier: bool = False) -> FloatArray:
    """Return readings, (n, V, C), or the classifier's probabilities, (n, C), in input order."""

    def forward(batch: Sequence[Encoding]) -> FloatArray:
        return engine.classify(batch) if classifier else engine.screen(batch).readings

    rows: list[FloatArray] = [np.empty(0, np.float32)] * len(texts)
    bar = tqdm(
        total=len(texts),
        desc="classify" if classifier else "screen",
        unit=" texts",
        leave=False,
        disable=None,
    )
    for batch in length_sorted_batches([len(t) for t in texts], BATCH_TOKENS):
        probabilities = forward([texts[i] for i in batch])
        for index, row in zip(batch, probabilities, strict=True):
            rows[index] = row
        bar.update(len(batch))
    bar.close()
    return np.stack(rows)


def texts_per_second(engine: Engine, texts: Sequence[Encoding]) -> float:
    """Return how many texts an engine screens per second in small batches, as under load.

    The best of several rounds over a few batches; takes seconds.
    """
    batches = [texts[i : i + SPEED_BATCH] for i in range(0, SPEED_TEXTS, SPEED_BATCH)]
    batches = [batch for batch in batches if batch]
    best, started = float("inf"), time.perf_counter()
    for _ in range(SPEED_ROUNDS):
        before = time.perf_counter()
        for batch in batches:
            engine.screen(batch)
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - started > SPEED_SECONDS:
            break
    return sum(map(len, batches)) / best
