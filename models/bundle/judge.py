"""Both stages of a bundle's screen on texts at hand, where nobody has to await the engine."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from models.bundle.load import Bundle
from models.detection.override import Ids, OverrideTest, T, Test, side_by_side
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
    thorough: bool | None = None,
) -> list[Verdict | ScreenError]:
    """Return the verdict of both stages on each text, or the error that prevents it.

    Args:
        bundle: what judges.
        encodings: the texts.
        readings: of each text, (V, C).
        read: gives the readings of what the override test puts together.
        thorough: whether all texts are tested, see `Manifest.tests_all_texts`.
    """
    truncated = [encoding.truncated for encoding in encodings]
    judged = bundle.screen.verdicts_of_batch(np.stack([*readings]), truncated) if truncated else []
    by_view: list[list[Verdict] | ScreenError] = [
        ScreenError(NOT_FINITE) if own is None else own for own in judged
    ]
    if (test := bundle.override) is not None:
        every = bundle.manifest.tests_all_texts(thorough)
        _confirm(bundle.engine, test, encodings, by_view, read, thorough=every)
    return [own if isinstance(own, ScreenError) else worst_verdict(own) for own in by_view]


def _confirm(
    engine: Engine,
    test: OverrideTest,
    encodings: Sequence[Encoding],
    by_view: Sequence[list[Verdict] | ScreenError],
    read: Reader,
    *,
    thorough: bool,
) -> None:
    """Replace each verdict for which the override test is due by that of both stages."""
    due = [
        (own, views, engine.content(encoding))
        for own, encoding in zip(by_view, encodings, strict=True)
        if not isinstance(own, ScreenError) and (views := test.views_due(own, thorough=thorough))
    ]
    running = [test.scores(ids, [own[view] for view in views]) for own, views, ids in due]
    outcomes = run_override_tests(engine, running, read)
    for (own, views, _), scores in zip(due, outcomes, strict=True):
        for view, score in zip(views, scores, strict=True):
            if math.isfinite(score):  # else the first stage decides alone
                own[view] = test.judge(own[view], score)


def run_override_tests(engine: Engine, running: Sequence[Test[T]], read: Reader) -> list[T]:
    """Run override tests side by side, and return what each returns."""
    together = side_by_side(running)
    try:
        inputs: Sequence[Ids] = next(together)
        while True:
            inputs = together.send([*read([engine.window(ids) for ids in inputs])])
    except StopIteration as done:
        outcomes: list[T] = done.value
        return outcomes
