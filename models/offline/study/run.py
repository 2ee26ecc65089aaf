"""The study of Zhao et al.: which backdoors survive tuning, and which attacks each defence stops.

Start with `run_study`, which goes through data sets x attacks x seeds x strategies, cell by cell.
Every step is cached under a digest of its inputs (`cache.py`). An interrupted study therefore
resumes where it stopped, and a changed recipe redoes only the steps that it affects.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from models.detection.conformal import min_calibration_size
from models.errors import DataError
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import LEARNING_RATES, TuneSettings, finetune_victim
from models.offline.fitting.split import split_texts
from models.offline.io.atomic import write_whole
from models.offline.io.bases import encoder_path
from models.offline.io.classifiers import labels_of, load_classifier, model_digest
from models.offline.io.samples import Sample
from models.offline.study.cache import MemoizedFunction, Step, StepCache, digest_of
from models.offline.study.compare import compare_defences
from models.offline.study.experiment import Experiment
from models.offline.study.grid import (
    Cell,
    ParaphraserLoader,
    Texts,
    cells,
    import_paraphraser,
    poisoned_test_texts,
    poisoned_training_texts,
)
from models.offline.study.recipe import PsimDefence, Recipe, StripDefence

ROWS = "rows.jsonl"


class InitialModel(NamedTuple):
    """A model that training starts from."""

    source: str
    """Folder or hub id."""
    digest: str


def run_study(
    recipe: Recipe, root: Path, out: Path, cache: StepCache, say: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """Run a study; yield a row for each cell as soon as it is done, and keep it in `rows.jsonl`.

    Args:
        recipe: the data sets, attacks, strategies, seeds and defences.
        root: folder that the paths of the recipe are relative to.
        out: folder of `rows.jsonl`.
        cache: steps of this study, and of others that may share some.
        say: called with a line whenever a cell begins.

    Raises:
        DataError: the recipe does not fit the data sets, or leaves nothing to do.
        VictimError: a model cannot be loaded or trained.
        CalibrationError: there are too few texts for a threshold.
    """
    base = str(encoder_path()) if recipe.base == "demo" else recipe.base
    start = InitialModel(base, model_digest(base))
    if not (planned := list(cells(recipe))):
        raise DataError("nothing to do: no data set of the recipe has syntactic paraphrases")
    texts = {data.name: Texts.load(data, root) for data in recipe.data}
    load_paraphraser = _memoized_paraphrasers(cache)
    check_recipe(recipe, planned, texts, load_paraphraser)
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {cell}")
        rows.append(_run_cell(cache, recipe, cell, texts[cell.data.name], start, load_paraphraser))
        _write_rows(out / ROWS, rows)
        yield rows[-1]


def _run_cell(
    cache: StepCache,
    recipe: Recipe,
    cell: Cell,
    texts: Texts,
    start: InitialModel,
    load_paraphraser: ParaphraserLoader,
) -> dict[str, Any]:
    """Poison a model, tune the victim from it, and compare the defences; return the row."""
    published = poison(cache, recipe, cell, texts, start, load_paraphraser)
    victim = tune(cache, recipe, cell, texts, published)
    experiment = make_experiment(recipe, cell, texts, published, victim, load_paraphraser)
    return {
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
        **compare_defences(cache, recipe, experiment),
    }


def check_recipe(
    recipe: Recipe,
    planned: list[Cell],
    texts: dict[str, Texts],
    load_paraphraser: ParaphraserLoader,
) -> None:
    """Check before any training that every attack and budget fits its data set.

    Attacks with a paraphraser are not tried, since that may take hours.

    Raises:
        DataError: an attack or a budget does not fit; the message says which.
    """
    for cell in planned:
        try:
            if not cell.attack.paraphraser:
                poisoned_training_texts(cell, texts[cell.data.name], load_paraphraser)
                poisoned_test_texts(cell, texts[cell.data.name], load_paraphraser)
        except DataError as error:
            raise DataError(f"{cell}: {error}") from error
    for name, data_texts in texts.items():
        for defence in recipe.defences:
            if isinstance(defence, PsimDefence | StripDefence):
                _check_budget(name, defence, data_texts)


def _check_budget(name: str, defence: PsimDefence | StripDefence, texts: Texts) -> None:
    """Raise `DataError` if there are too few texts for a threshold with the defence's budget."""
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


def _memoized_paraphrasers(cache: StepCache) -> ParaphraserLoader:
    """Return a loader of paraphrasers that rewrite each text only once."""

    @functools.cache
    def load_paraphraser(name: str) -> Callable[[str], str]:
        file = cache.root / "paraphraser" / f"{name.replace(':', '.')}.jsonl"
        return MemoizedFunction(file, import_paraphraser(name))

    return load_paraphraser


def poison(
    cache: StepCache,
    recipe: Recipe,
    cell: Cell,
    texts: Texts,
    start: InitialModel,
    load_paraphraser: ParaphraserLoader,
) -> Step:
    """Train the weights that the attacker publishes: full fine-tuning on a poisoned set."""
    poisoned = poisoned_training_texts(cell, texts, load_paraphraser)
    settings = _settings(recipe, Strategy.FULL, recipe.training.poison_epochs, cell.seed)
    return _train(cache, "published", start, poisoned, texts.dev, settings)


def tune(cache: StepCache, recipe: Recipe, cell: Cell, texts: Texts, published: Step) -> Step:
    """Train the victim: the user's own tuning of the published weights on clean texts."""
    start = InitialModel(str(published.folder / "model"), published.key)
    settings = _settings(recipe, cell.strategy, recipe.training.tune_epochs, cell.seed)
    return _train(cache, "victim", start, texts.train, texts.dev, settings)


def _settings(recipe: Recipe, strategy: Strategy, epochs: int, seed: int) -> TuneSettings:
    rate = recipe.training.learning_rates.get(strategy, LEARNING_RATES[strategy])
    return TuneSettings(strategy, epochs, rate, seed)


def _train(
    cache: StepCache,
    kind: str,
    start: InitialModel,
    train: list[Sample],
    dev: list[Sample],
    settings: TuneSettings,
) -> Step:
    def make(folder: Path) -> object:
        out = folder / "model"
        result = finetune_victim(
            start.source, train, dev, settings.strategy, out, epochs=settings.epochs,
            learning_rate=settings.learning_rate, seed=settings.seed,
        )  # fmt: skip
        labels = labels_of(load_classifier(str(out))[0])
        return {"clean_accuracy": result.clean_accuracy, "labels": labels}

    data = {"train": digest_of(train), "dev": digest_of(dev)}
    return cache.step(kind, {"start": start.digest, **data, **asdict(settings)}, make)


def make_experiment(
    recipe: Recipe,
    cell: Cell,
    texts: Texts,
    published: Step,
    victim: Step,
    load_paraphraser: ParaphraserLoader,
) -> Experiment:
    """Gather the victim of a cell and the texts that defences are fitted and measured on."""
    poisoned = poisoned_test_texts(cell, texts, load_paraphraser)
    # A paraphraser was run on texts of one attack, without words before the trigger.
    rewritten = {} if cell.attack.bury_behind else cell.data.paraphrased
    return Experiment(
        victim=victim,
        published=published,
        train=texts.train,
        dev=texts.dev,
        clean=texts.test,
        poisoned=[text for text, _ in poisoned],
        targets=[target for _, target in poisoned],
        paraphrased={
            name: texts.paraphrased[name]
            for name, files in rewritten.items()
            if files.triggers == cell.attack.triggers
        },
        seed=cell.seed,
        dtype=recipe.dtype,
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
