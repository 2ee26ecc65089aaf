"""Running an engine on many texts, and timing it."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from tqdm import tqdm

from models.bundle.judge import judge_readings, run_override_tests
from models.bundle.load import Bundle
from models.detection.explain import Explanation, explain, run_search
from models.detection.override import Ids, OverrideTest
from models.detection.passage import find_passage
from models.detection.screen import FloatArray, Verdict
from models.engines.base import Encoding, Engine
from models.engines.batching import in_batches
from models.errors import ScreenError

SPEED_TEXTS, SPEED_BATCH, SPEED_ROUNDS, SPEED_SECONDS = 64, 8, 5, 3.0


def predict(engine: Engine, texts: Sequence[Encoding], *, classifier: bool = False) -> FloatArray:
    """Return readings, (n, V, C), or the classifier's probabilities, (n, L), in input order."""

    def forward(batch: Sequence[Encoding]) -> FloatArray:
        return engine.classify(batch) if classifier else engine.screen(batch).readings

    bar = tqdm(
        total=len(texts),
        desc="classify" if classifier else "screen",
        unit=" texts",
        leave=False,
        disable=None,
    )
    with bar:
        return np.stack(in_batches(forward, texts, bar.update))


def judge_texts(
    bundle: Bundle, encodings: Sequence[Encoding], *, thorough: bool | None = None
) -> list[Verdict | ScreenError]:
    """Return the verdict of both stages on each text, or the error that prevents it.

    Args:
        bundle: what judges.
        encodings: the texts.
        thorough: whether all texts are tested, see `Manifest.tests_all_texts`.
    """
    return judge_readings(
        bundle,
        encodings,
        predict(bundle.engine, encodings) if encodings else (),
        partial(predict, bundle.engine),
        thorough=thorough,
    )


def require_verdicts(
    bundle: Bundle, encodings: Sequence[Encoding], *, thorough: bool | None = None
) -> list[Verdict]:
    """Return the verdict of both stages on each text, as `judge_texts` does.

    Raises:
        ScreenError: a text cannot be judged.
    """
    verdicts = []
    for verdict in judge_texts(bundle, encodings, thorough=thorough):
        if isinstance(verdict, ScreenError):
            raise verdict
        verdicts.append(verdict)
    return verdicts


def run_tests(
    engine: Engine, test: OverrideTest, texts: Sequence[tuple[Ids, Verdict]]
) -> list[float]:
    """Run override tests on texts, each given with its first verdict; return their scores."""
    running = [test.score(ids, v) for ids, v in texts]
    return run_override_tests(engine, running, partial(predict, engine))


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
        tests = [test.score(part[:most], verdict, whole) for part in ids]
        return run_override_tests(engine, tests, partial(predict, engine))

    return run_search(explain(text, verdict, run_search(find_passage(text, verdict), keep)), screen)


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
