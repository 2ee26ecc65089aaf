"""Choice of the carriers of the override test: short clean texts of which the victim is sure."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from models.detection.override import CARRIER_TOKENS
from models.detection.screen import FloatArray
from models.detection.views import Views
from models.engines.base import Engine
from models.errors import DataError
from models.offline.fitting.split import Split
from models.offline.io.inference import predict

CARRIERS = 16
"""Carriers of a class: so many that an attacker cannot train a trigger to yield to each."""
CANDIDATES = 1500
"""Texts that carriers are chosen from."""
MIN_WORDS = 4
"""A text of fewer words is a weak carrier."""
SURE = 0.8
"""Least probability of a carrier's class."""


Piece = TypeVar("Piece")
Carriers = Sequence[Sequence[str]]
"""Texts by class."""


def choose_carriers(
    engine: Engine, split: Split, views: Views, given: Sequence[str] = ()
) -> Carriers:
    """Return carriers for each class: the beginnings of texts of which the victim is most sure.

    A class that the victim is sure of in no text gets none. A view without two classes that have
    carriers gets none at all, since it cannot be tested. If there is no other one, the result is
    empty: then there is no override test.

    Args:
        engine: the guarded victim; PSIM's first checkpoint is the victim itself.
        split: clean texts; those for calibration are left alone.
        views: of the victim.
        given: clean texts to choose from instead.

    Raises:
        DataError: texts were given, and the victim is not sure of enough of them.
    """
    texts = given or [*split.held_out, *split.train]
    pieces = list(
        dict.fromkeys(beginning(text) for text in texts if len(text.split()) >= MIN_WORDS)
    )
    pieces = [piece for piece in pieces[:CANDIDATES] if len(engine.token_ids(piece))]
    encodings = engine.encode(pieces)
    carriers = surest(pieces, predict(engine, encodings)[:, 0]) if encodings else []
    for view in views if carriers else ():
        if sum(bool(carriers[c]) for c in view) < 2:
            carriers[view.start : view.stop] = [[] for _ in view]
    if any(carriers):
        return carriers
    if given:
        raise DataError(
            "the victim must be sure of carriers of two classes at least: give more texts, of "
            f"{MIN_WORDS} words or more, from every class"
        )
    return []


def surest(pieces: Sequence[Piece], probabilities: FloatArray) -> list[list[Piece]]:
    """Return by class the pieces of which the victim is most sure, given (n, C) probabilities."""
    carriers = []
    for sure in probabilities.T:
        best = np.argsort(-sure, kind="stable")[:CARRIERS]
        carriers.append([pieces[i] for i in best if sure[i] >= SURE])
    return carriers


def beginning(text: str) -> str:
    """Return the first words of a text: about as many as a carrier may have tokens."""
    return " ".join(text.split()[: CARRIER_TOKENS * 3 // 4])
