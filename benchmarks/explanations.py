"""Whether explanations name the trigger, and whether sanitized texts keep their label.

Of the poisoned texts that a bundle flags: how often the trigger's words weigh most, how much of the
trigger is removed, and how often the cleaned text gets the label that the clean original gets; and
how many clean texts are changed.

    python benchmarks/explanations.py BUNDLE CLEAN TARGET --trigger "mn"
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from models.bundle.load import Bundle, load_bundle
from models.detection.screen import Verdict
from models.engines.base import Encoding, Engine, Screening
from models.offline.attacks.poisoning import WORD_TRIGGER, Insertion, poison_test_set
from models.offline.evaluation.metrics import Classes, Rate
from models.offline.evaluation.report import percent
from models.offline.io.inference import judge_texts, predict, search_trigger
from models.offline.io.samples import load_samples


class CountedEngine:
    """An engine that counts the inputs that it screens."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.screened = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        """Screen and count."""
        self.screened += len(batch)
        return self._engine.screen(batch)


@dataclass
class Found:
    """What became of one flagged text."""

    heaviest: bool
    covered: float
    """Share of the trigger's characters that are removed."""
    more: float
    """Share of the other characters that are removed."""
    cleaned: str | None
    original: str
    screened: int
    seconds: float


def examine(bundle: Bundle, text: str, original: str, verdict: Verdict, trigger: str) -> Found:
    before, started = screened_by(bundle), time.perf_counter()
    found = search_trigger(bundle, text, verdict)
    seconds = time.perf_counter() - started
    start = f" {text} ".index(f" {trigger} ")
    span = range(start, start + len(trigger))
    removed = {at for a, b in found.removed for at in range(a, b)}
    return Found(
        heaviest=max(found.words, key=lambda word: word.weight).start in span,
        covered=len(removed & set(span)) / len(span),
        more=len(removed - set(span)) / max(len(text) - len(span), 1),
        cleaned=found.cleaned,
        original=original,
        screened=screened_by(bundle) - before,
        seconds=seconds,
    )


def screened_by(bundle: Bundle) -> int:
    screened: int = getattr(bundle.engine, "screened", 0)
    return screened


def judge(bundle: Bundle, texts: list[str]) -> list[Verdict]:
    verdicts = judge_texts(bundle, bundle.engine.encode(texts))
    return [one for one in verdicts if isinstance(one, Verdict)]


def classify(bundle: Bundle, texts: list[str]) -> Classes:
    if not texts:
        return np.empty(0, np.intp)
    classes: Classes = predict(bundle.engine, bundle.engine.encode(texts), classifier=True).argmax(
        1
    )
    return classes


def share(hits: list[bool]) -> str:
    return percent(Rate.of(np.array(hits, np.bool_)))


def main(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    clean: str,
    target: str,
    trigger: Annotated[str, typer.Option(help="Word or sentence.")] = WORD_TRIGGER,
    most: Annotated[int, typer.Option(help="Poisoned texts.")] = 300,
    skip: Annotated[int, typer.Option(help="Texts before these were used for development.")] = 0,
    dtype: str = "float32",
) -> None:
    loaded = load_bundle(path, dtype)
    bundle = replace(loaded, engine=cast(Engine, CountedEngine(loaded.engine)))
    samples = load_samples(clean, drop_empty=True)[skip:]
    originals = [s.text for s in samples if s.label != target][:most]
    poisoned = [
        s.text for s in poison_test_set(samples, Insertion((trigger,)), target)[: len(originals)]
    ]
    verdicts = judge(bundle, poisoned)
    flagged = [
        (text, original, verdict)
        for text, original, verdict in zip(poisoned, originals, verdicts, strict=True)
        if verdict.poisoned
    ]
    found = [
        examine(bundle, text, original, verdict, trigger)
        for text, original, verdict in tqdm(flagged, desc="explanations")
    ]
    cleaned = [f for f in found if f.cleaned is not None]
    same = np.zeros(len(found), np.bool_)
    same[: len(cleaned)] = classify(bundle, [str(f.cleaned) for f in cleaned]) == classify(
        bundle, [f.original for f in cleaned]
    )
    screened = np.array([f.screened for f in found])
    clean_verdicts = judge(bundle, [s.text for s in samples])
    table = Table(
        "", "", title=f"{len(flagged)} of {len(poisoned)} poisoned texts flagged; shares in %"
    )
    table.add_row("a word of the trigger weighs most", share([f.heaviest for f in found]))
    table.add_row("all of the trigger removed", share([f.covered == 1 for f in found]))
    table.add_row("of its characters, removed", f"{100 * np.mean([f.covered for f in found]):.1f}")
    table.add_row("of other characters, removed", f"{100 * np.mean([f.more for f in found]):.1f}")
    table.add_row("passes without what was removed", share([f.cleaned is not None for f in found]))
    table.add_row("and gets the label of the clean original", share(same.tolist()))
    table.add_row("clean texts left as they are", share([not v.poisoned for v in clean_verdicts]))
    table.add_row(
        "passes for one", f"{screened.mean():.0f} (95 %: {np.quantile(screened, 0.95):.0f})"
    )
    table.add_row("seconds for one", f"{np.mean([f.seconds for f in found]):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
