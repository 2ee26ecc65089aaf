"""The study of Zhao et al.: what attacks leave in tuned victims, and what each defence stops.

Read `run_study`: data sets x attacks x strategies x seeds, each cell from top to bottom. Every step
is kept under a digest of its inputs (`store.py`), so that an interrupted study goes on where it was
and a changed recipe redoes only what it touches.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from models.detection.conformal import min_calibration_size
from models.errors import DataError
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import LEARNING_RATES, finetune_victim
from models.offline.fitting.split import split_texts
from models.offline.io.atomic import write_whole
from models.offline.io.classifiers import encoder_path, labels_of, load_classifier, model_digest
from models.offline.io.samples import Sample
from models.offline.study.cache import Memo, Step, StepCache, digest_of
from models.offline.study.compare import contest
from models.offline.study.experiment import Case
from models.offline.study.grid import (
    Cell,
    Hook,
    Texts,
    cells,
    imported,
    poisoned_test_texts,
    poisoned_training_texts,
)
from models.offline.study.recipe import PsimDefence, Recipe, StripDefence

ROWS = "rows.jsonl"


def run_study(
    recipe: Recipe, root: Path, out: Path, store: StepCache, say: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """Run a study; yield a row for each cell as soon as it is done, kept in `out/rows.jsonl` too.

    Args:
        recipe: what is varied.
        root: folder that the recipe's paths are relative to.
        out: folder for results.
        store: where the steps are kept; studies that have steps in common may share one.
        say: called with a line whenever a cell begins.

    Raises:
        DataError, VictimError, CalibrationError: as their messages say.
    """
    base = str(encoder_path()) if recipe.base == "demo" else recipe.base
    start = base, model_digest(base)
    if not (planned := list(cells(recipe))):
        raise DataError("nothing to do: no data set of the recipe has syntactic paraphrases")
    texts = {data.name: Texts.load(data, root) for data in recipe.data}
    hook = _remembering(store)
    check(recipe, planned, texts, hook)
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {cell}")
        own = texts[cell.data.name]
        published = poison(store, recipe, cell, own, start, hook)
        victim = tune(store, recipe, cell, own, published)
        rows.append(
            {
                "data": cell.data.name,
                "attack": cell.attack.name,
                "strategy": str(cell.strategy),
                "seed": cell.seed,
                "base": recipe.base,
                "dtype": recipe.dtype,
                "attack_settings": cell.attack.model_dump(mode="json", exclude_defaults=True),
                "labels": victim.result["labels"],
                "published_dev_accuracy": published.result["clean_accuracy"],
                "victim_dev_accuracy": victim.result["clean_accuracy"],
                **contest(store, recipe, make_case(recipe, cell, own, published, victim, hook)),
            }
        )
        _write_rows(out / ROWS, rows)
        yield rows[-1]


def check(recipe: Recipe, planned: list[Cell], texts: dict[str, Texts], hook: Hook) -> None:
    """Find before the first hour of training what would end the study after the last.

    Raises:
        DataError: an attack or a budget does not fit a data set; says which.
    """
    for cell in planned:
        try:
            if not cell.attack.paraphraser:
                poisoned_training_texts(cell, texts[cell.data.name], hook)
                poisoned_test_texts(cell, texts[cell.data.name], hook)
        except DataError as error:
            raise DataError(f"{cell}: {error}") from error
    for name, own in texts.items():
        for defence in recipe.defences:
            if isinstance(defence, PsimDefence | StripDefence):
                _check_budget(name, defence, own)


def _check_budget(name: str, defence: PsimDefence | StripDefence, texts: Texts) -> None:
    """Raise `DataError` if there are too few texts for a threshold that keeps the budget."""
    counts = {"dev": len(texts.dev)}
    if isinstance(defence, PsimDefence):
        split = split_texts([s.text for s in texts.train[: defence.texts]], seed=0)
        counts = counts if "dev" in defence.rules else {}
        counts["calibration"] = len(split.calibrate)
    needed = min_calibration_size(defence.frr_budget)
    for kind, count in counts.items():
        if count < needed:
            raise DataError(
                f"{name}, {defence.name}: {count} {kind} texts are too few for a budget of "
                f"{defence.frr_budget}, which needs {needed}"
            )


def _remembering(store: StepCache) -> Hook:
    """Return what finds paraphrasers, and never asks them twice about a text."""

    @cache
    def hook(name: str) -> Callable[[str], str]:
        file = f"{name.replace(':', '.')}.jsonl"
        return Memo(store.root / "paraphraser" / file, imported(name))

    return hook


def poison(
    store: StepCache, recipe: Recipe, cell: Cell, texts: Texts, start: tuple[str, str], hook: Hook
) -> Step:
    """Make the weights that the attacker publishes: full fine-tuning on a poisoned set."""
    poisoned = poisoned_training_texts(cell, texts, hook), texts.dev
    epochs = recipe.training.poison_epochs
    return _train(store, "published", recipe, start, poisoned, Strategy.FULL, epochs, cell.seed)


def tune(store: StepCache, recipe: Recipe, cell: Cell, texts: Texts, published: Step) -> Step:
    """Make the victim: the user's own tuning on clean texts."""
    start = str(published.folder / "model"), published.key
    clean, epochs = (texts.train, texts.dev), recipe.training.tune_epochs
    return _train(store, "victim", recipe, start, clean, cell.strategy, epochs, cell.seed)


def _train(
    store: StepCache,
    kind: str,
    recipe: Recipe,
    start: tuple[str, str],
    texts: tuple[list[Sample], list[Sample]],
    strategy: Strategy,
    epochs: int,
    seed: int,
) -> Step:
    """Train from a model, named by path and digest, on train and dev texts."""
    rate = recipe.training.learning_rates.get(strategy, LEARNING_RATES[strategy])

    def make(folder: Path) -> object:
        out = folder / "model"
        result = finetune_victim(
            start[0], *texts, strategy, out, epochs=epochs, learning_rate=rate, seed=seed
        )
        labels = labels_of(load_classifier(str(out))[0])
        return {"clean_accuracy": result.clean_accuracy, "labels": labels}

    inputs = {
        "start": start[1],
        "train": digest_of(texts[0]),
        "dev": digest_of(texts[1]),
        "strategy": strategy,
        "learning_rate": rate,
        "epochs": epochs,
        "seed": seed,
    }
    return store.step(kind, inputs, make)


def make_case(
    recipe: Recipe, cell: Cell, texts: Texts, published: Step, victim: Step, hook: Hook
) -> Case:
    """Gather what the defences get to see of a cell, and what they are measured on."""
    poisoned = poisoned_test_texts(cell, texts, hook)
    same = {} if cell.attack.bury_behind else cell.data.paraphrased
    return Case(
        victim=victim,
        published=published,
        train=texts.train,
        dev=texts.dev,
        clean=texts.test,
        poisoned=[text for text, _ in poisoned],
        targets=[target for _, target in poisoned],
        paraphrased={
            name: texts.paraphrased[name]
            for name, pair in same.items()
            if pair.triggers == cell.attack.triggers
        },
        seed=cell.seed,
        dtype=recipe.dtype,
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
