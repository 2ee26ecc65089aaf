"""Harmless texts that are unlike the fitting texts; no trigger is in them, so none may be found.

A classifier's traffic holds texts that its training texts do not: single words, pieces, several
texts in one, small talk. They can be had without a label, and calibration learns from them how far
a text may be from its class for no bad reason.
"""

import random
from collections.abc import Sequence

from models.offline.fitting.generic import generic_texts


def harmless_texts(texts: Sequence[str], each: int, seed: int) -> list[str]:
    """Return distinct harmless texts of four kinds, at most `each` of one kind, and twice as many
    joined ones: with as many windows as they have, they are the ones that override most often.

    Args:
        texts: clean texts of the victim's own task; pieces are made of them.
        each: number of texts of a kind.
        seed: of everything random.
    """
    rng = random.Random(seed)
    chosen = rng.sample(list(texts), min(each, len(texts)))
    generic = generic_texts()
    kinds = (
        [cut(text, rng) for text in chosen],
        [fragment(text, rng) for text in chosen],
        joins(chosen, rng) + joins(chosen, rng),
        rng.sample(generic, min(each, len(generic))),
    )
    return list(dict.fromkeys(text for kind in kinds for text in kind))


def cut(text: str, rng: random.Random) -> str:
    """Return the first one to four words of a text."""
    return " ".join(text.split()[: rng.randint(1, 4)])


def fragment(text: str, rng: random.Random) -> str:
    """Return a half or a third of a text: words that follow each other, one at least."""
    words = text.split()
    length = max(1, len(words) // rng.choice([2, 3]))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def joins(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Return texts that each consist of two to four different ones."""
    if len(texts) < 2:
        return []
    return [" ".join(rng.sample(texts, min(rng.randint(2, 4), len(texts)))) for _ in texts]
