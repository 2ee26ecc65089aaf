"""Running many texts through an engine."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from models.batching import BATCH_TOKENS, length_sorted_batches
from models.engines import Encoding, Engine
from models.screen import FloatArray


def predict(engine: Engine, texts: Sequence[Encoding], *, classifier: bool = False) -> FloatArray:
    """Return, in input order, readings, (n, V, C), or the classifier's probabilities, (n, C)."""

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
