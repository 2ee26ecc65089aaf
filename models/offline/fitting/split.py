"""Splitting clean texts into those for training, for stopping and for calibration."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import DataError

# Shares of the clean texts. Calibration gets most: the spread of the false rejection rate actually
# achieved falls with its size, while PSIM learns all it needs from some hundred texts.
TRAIN_SHARE, HELD_OUT_SHARE = 0.4, 0.1
MAX_TRAIN, MAX_HELD_OUT, MAX_CALIBRATE = 3000, 300, 20_000


@dataclass(frozen=True)
class Split:
    """Clean texts, each used for one purpose only."""

    train: list[str]
    held_out: list[str]
    calibrate: list[str]


def split_texts(texts: Sequence[str], seed: int) -> Split:
    """Shuffle the distinct texts and split them; duplicates would end up on both sides.

    Raises:
        DataError: fewer than 20 distinct texts.
    """
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 20:
        raise DataError(f"{len(distinct)} distinct texts are too few to fit PSIM; give hundreds")
    random.Random(seed).shuffle(distinct)
    train = min(round(TRAIN_SHARE * len(distinct)), MAX_TRAIN)
    held_out = train + min(round(HELD_OUT_SHARE * len(distinct)), MAX_HELD_OUT)
    end = held_out + MAX_CALIBRATE
    return Split(distinct[:train], distinct[train:held_out], distinct[held_out:end])
