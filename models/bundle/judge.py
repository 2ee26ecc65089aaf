"""Both stages of a bundle's screen on texts at hand, where nobody has to await the engine."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from models.bundle.load import Bundle
from models.detection.override import OverrideTest, Test
from models.detection.screen import NOT_FINITE, FloatArray, Verdict, worst_verdict
from models.engines.base import Encoding, Engine
from models.errors import ScreenError

Reader = Callable[[Sequence[Encoding]], Iterable[FloatArray]]
"""Returns the readings of each text, (V, C)."""


def judge_readings(
    bundle: Bundle,
    encodings: Sequence[Encoding],
    readings: Iterable[FloatArray],
    read: Reader,
    *,
    thorough: bool = False,
) -> list[Verdict | ScreenError]:
    """Return the verdict of both stages on each text, or the error that prevents it.

    Args:
        bundle: what judges.
        encodings: the texts.
        readings: of each text, (V, C).
        read: gives the readings of what the override test puts together.
        thorough: whether every text goes through the override test, not only suspicious ones.
    """
    truncated = [encoding.truncated for encoding in encodings]
    judged = bundle.screen.verdicts_of_batch(np.stack([*readings]), truncated) if truncated else []
    by_view: list[list[Verdict] | ScreenError] = [
        ScreenError(NOT_FINITE) if own is None else own for own in judged
    ]
    if (test := bundle.override_test(thorough=thorough)) is not None:
        _confirm(bundle, test, encodings, by_view, read, thorough=thorough)
    return [own if isinstance(own, ScreenError) else worst_verdict(own) for own in by_view]


def _confirm(
    bundle: Bundle,
    test: OverrideTest,
    encodings: Sequence[Encoding],
    by_view: Sequence[list[Verdict] | ScreenError],
    read: Reader,
    *,
    thorough: bool,
) -> None:
    """Replace each verdict for which the override test is due by that of both stages."""
    due = [
        (number, view, verdict)
        for number, own in enumerate(by_view)
        for view, verdict in enumerate([] if isinstance(own, ScreenError) else own)
        if test.is_due(bundle.screen, verdict, thorough=thorough)
    ]
    running = [
        test.score(bundle.engine.content(encodings[number]), verdict) for number, _, verdict in due
    ]
    for (number, view, verdict), score in zip(
        due, run_override_tests(bundle.engine, running, read), strict=True
    ):
        own = by_view[number]
        if math.isfinite(score) and isinstance(own, list):  # else the first stage decides alone
            own[view] = test.judge(verdict, score)


def run_override_tests(engine: Engine, running: Sequence[Test], read: Reader) -> list[float]:
    """Run override tests side by side, and return their scores."""
    asked = {number: next(one) for number, one in enumerate(running)}
    scores = [0.0] * len(running)
    while asked:
        readings = iter(read([engine.window(ids) for inputs in asked.values() for ids in inputs]))
        for number, inputs in list(asked.items()):
            try:
                asked[number] = running[number].send([next(readings) for _ in inputs])
            except StopIteration as done:
                scores[number] = done.value
                del asked[number]
    return scores
