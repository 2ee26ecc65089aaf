"""Running an engine on many texts, and timing it."""

import math
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from models.bundle.load import Bundle
from models.detection.explain import Explanation, explain, run_search
from models.detection.override import Ids, OverrideTest, Test
from models.detection.passage import find_passage
from models.detection.screen import FloatArray, Verdict, worst_verdict
from models.engines.base import Encoding, Engine
from models.engines.batching import BATCH_TOKENS, length_sorted_batches
from models.errors import ScreenError

SPEED_TEXTS, SPEED_BATCH, SPEED_ROUNDS, SPEED_SECONDS = 64, 8, 5, 3.0


def predict(engine: Engine, texts: Sequence[Encoding], *, classifier: bool = False) -> FloatArray:
    """Return readings, (n, V, C), or the classifier's probabilities, (n, L), in input order."""

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


def judge_texts(
    bundle: Bundle, encodings: Sequence[Encoding], *, thorough: bool = False
) -> list[Verdict | ScreenError]:
    """Return the verdict of both stages on each text, or the error that prevents it.

    Args:
        bundle: what judges.
        encodings: the texts.
        thorough: whether every text goes through the override test, not only suspicious ones.
    """
    by_view: list[list[Verdict] | ScreenError] = []
    readings = predict(bundle.engine, encodings) if encodings else ()
    for encoding, row in zip(encodings, readings, strict=True):
        try:
            by_view.append(bundle.screen.verdicts(row, encoding.truncated))
        except ScreenError as error:
            by_view.append(error)
    if (test := bundle.override_test(thorough=thorough)) is not None:
        _confirm(bundle, test, encodings, by_view, thorough=thorough)
    return [own if isinstance(own, ScreenError) else worst_verdict(own) for own in by_view]


def _confirm(
    bundle: Bundle,
    test: OverrideTest,
    encodings: Sequence[Encoding],
    by_view: Sequence[list[Verdict] | ScreenError],
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
    asked = [(bundle.engine.content(encodings[number]), verdict) for number, _, verdict in due]
    for (number, view, verdict), score in zip(
        due, run_tests(bundle.engine, test, asked), strict=True
    ):
        own = by_view[number]
        if math.isfinite(score) and isinstance(own, list):  # else the first stage decides alone
            own[view] = test.judge(verdict, score)


def require_verdicts(bundle: Bundle, encodings: Sequence[Encoding]) -> list[Verdict]:
    """Return the verdict of both stages on each text.

    Raises:
        ScreenError: a text cannot be judged.
    """
    verdicts = []
    for verdict in judge_texts(bundle, encodings):
        if isinstance(verdict, ScreenError):
            raise verdict
        verdicts.append(verdict)
    return verdicts


def run_tests(
    engine: Engine, test: OverrideTest, texts: Sequence[tuple[Ids, Verdict]]
) -> list[float]:
    """Run override tests on texts, each given with its first verdict; return their scores."""
    return _run_tests(engine, [test.score(ids, v.predicted) for ids, v in texts])


def search_trigger(bundle: Bundle, text: str, verdict: Verdict) -> Explanation:
    """Search for the trigger of a text, given its verdict.

    Raises:
        ScreenError: a variant of the text cannot be judged.
    """
    engine, test = bundle.engine, bundle.override

    def screen(texts: list[str]) -> list[Verdict]:
        return require_verdicts(bundle, engine.encode(texts))

    def keep(parts: list[str]) -> list[float]:
        if test is None:
            return [0.0] * len(parts)
        whole, *ids = (engine.token_ids(one) for one in (text, *parts))
        most = engine.window_length
        tests = [test.score(part[:most], verdict.predicted, whole) for part in ids]
        return _run_tests(engine, tests)

    return run_search(explain(text, verdict, run_search(find_passage(text, verdict), keep)), screen)


def _run_tests(engine: Engine, running: Sequence[Test]) -> list[float]:
    asked = {number: next(one) for number, one in enumerate(running)}
    scores = [0.0] * len(running)
    while asked:
        readings = iter(
            predict(engine, [engine.window(ids) for inputs in asked.values() for ids in inputs])
        )
        for number, inputs in list(asked.items()):
            try:
                asked[number] = running[number].send([next(readings) for _ in inputs])
            except StopIteration as done:
                scores[number] = done.value
                del asked[number]
    return scores


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
