"""The study of Zhao et al.: which backdoors survive tuning, and which attacks each defence stops.

Start with `run_study`, which goes through data sets x attacks x seeds x strategies, cell by cell.
Every step is cached under a digest of its inputs (`cache.py`). An interrupted study therefore
resumes where it stopped, and a changed recipe redoes only the steps that it affects.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from models.detection.conformal import min_calibration_size
from models.errors import DataError
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import (
    LEARNING_RATES,
    Penalty,
    TuneSettings,
    finetune_victim,
)
from models.offline.fitting.split import split_texts
from models.offline.io.atomic import write_whole
from models.offline.io.bases import BASES, MissingBaseError, base_folder
from models.offline.io.classifiers import labels_of, load_classifier, model_digest
from models.offline.io.samples import Sample
from models.offline.study.cache import VERSIONS, MemoizedFunction, Step, StepCache, digest_of
from models.offline.study.compare import compare_defences
from models.offline.study.defences.activations import CleanTexts
from models.offline.study.defences.scan import scan_victim
from models.offline.study.experiment import Experiment
from models.offline.study.grid import (
    Cell,
    ParaphraserLoader,
    Texts,
    cells,
    honest_texts,
    import_paraphraser,
    load_others,
    poisoned_test_texts,
    poisoned_training_texts,
)
from models.offline.study.recipe import (
    BundleDefence,
    DataSet,
    DetectorDefence,
    PsimDefence,
    Recipe,
    StripDefence,
)

ROWS, CELLS = "rows.jsonl", "cells"
SHARED = {"training", "dtype", "defences", "honest", "scan"}
"""What the results of a cell depend on in a recipe, besides the cell."""
DEFENDED = ("psim", "bundle", "verdicts")
"""Kinds of steps whose versions the results of defences depend on."""


class InitialModel(NamedTuple):
    """A model that training starts from."""

    source: str
    """Folder or hub id."""
    digest: str


def run_study(
    recipe: Recipe,
    root: Path,
    out: Path,
    cache: StepCache,
    say: Callable[[str], object],
    only: str = "*",
    kept: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run a study; yield a row for each cell as soon as it is done, and keep it.

    Args:
        recipe: the bases, data sets, attacks, strategies, seeds and defences.
        root: folder that the paths of the recipe are relative to.
        out: folder of `rows.jsonl`, which has the rows of earlier runs too.
        cache: steps of this study, and of others that may share some.
        say: called with a line whenever a cell begins, and for a base that is left out.
        only: pattern, as of a shell, for the names of the cells to run.
        kept: folder of the rows of all cells that are done; `cells` in `out` by default.

    Raises:
        DataError: the recipe does not fit the data sets, or leaves nothing to do.
        MissingBaseError: no base is installed.
        VictimError: a model cannot be loaded or trained.
        CalibrationError: there are too few texts for a threshold.
    """
    kept = kept or out / CELLS
    starts, planned = _planned_cells(recipe, only, say)
    texts = {name: Texts.load(data, root, say) for name, data in _data_sets(planned).items()}
    others = load_others(recipe, root)
    load_paraphraser = _memoized_paraphrasers(cache)
    check_recipe(recipe, planned, texts, load_paraphraser)
    for number, cell in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {cell}")
        own, start = texts[cell.data.name], starts[cell.base]
        honest = honest_texts(recipe, cell, own, others)
        row = _run_cell(cache, recipe, cell, own, honest, start, load_paraphraser)
        _keep(row, _cell_file(recipe, cell, kept))
        _write_rows(out / ROWS, [done for _, done in done_cells(recipe, kept) if done])
        yield row


def done_cells(recipe: Recipe, kept: Path) -> list[tuple[Cell, dict[str, Any] | None]]:
    """Return the cells of a recipe, each with its row from a folder of rows; None if not done.

    A row is known by everything in the recipe that it depends on. Files that changed under the same
    name are noticed only when the cell is run again. Its `versions` are the `VERSIONS` of the code
    that made it.
    """
    done = []
    for cell in cells(recipe):
        file = _cell_file(recipe, cell, kept)
        done.append((cell, json.loads(file.read_text("utf-8")) if file.exists() else None))
    return done


def _cell_file(recipe: Recipe, cell: Cell, kept: Path) -> Path:
    # Without defaults, so that rows keep their names when a recipe gets another field.
    parts = [
        cell.data.model_dump(mode="json", exclude_defaults=True),
        cell.attack.model_dump(mode="json", exclude_defaults=True),
        recipe.model_dump(mode="json", exclude_defaults=True, include=SHARED),
        *(
            other.model_dump(mode="json", exclude_defaults=True)
            for other in cell.planted
            if other is not cell.attack
        ),
    ]
    return kept / f"{digest_of([cell.base, cell.strategy, cell.seed, *parts])}.json"


def _keep(row: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(row, indent=1) + "\n")


def _planned_cells(
    recipe: Recipe, only: str, say: Callable[[str], object]
) -> tuple[dict[str, InitialModel], list[Cell]]:
    """Return the models to start from, and the chosen cells for which there is one."""
    chosen = _chosen_cells(recipe, only)
    starts = _initial_models([cell.base for cell in chosen], say)
    return starts, [cell for cell in chosen if cell.base in starts]


def _chosen_cells(recipe: Recipe, only: str) -> list[Cell]:
    if not (known := list(cells(recipe))):
        raise DataError("nothing to do: no data set of the recipe has what its attacks need")
    if not (chosen := [cell for cell in known if fnmatchcase(cell.name, only)]):
        raise DataError(f"no cell is named {only!r}; the first one is {known[0].name!r}")
    return chosen


def _data_sets(planned: list[Cell]) -> dict[str, DataSet]:
    return {cell.data.name: cell.data for cell in planned}


def _initial_models(bases: Iterable[str], say: Callable[[str], object]) -> dict[str, InitialModel]:
    """Return the models to start from by their name in the recipe, without those not installed."""
    starts, missing = dict[str, InitialModel](), list[MissingBaseError]()
    for base in dict.fromkeys(bases):
        try:
            name = "minilm" if base == "demo" else base
            source = str(base_folder(name)) if name in BASES else base
            starts[base] = InitialModel(source, model_digest(source))
        except MissingBaseError as error:
            say(f"left out: {error}")
            missing.append(error)
    if not starts:
        raise missing[0]
    return starts


def _run_cell(
    cache: StepCache,
    recipe: Recipe,
    cell: Cell,
    texts: Texts,
    honest: dict[str, list[str]],
    start: InitialModel,
    load_paraphraser: ParaphraserLoader,
) -> dict[str, Any]:
    """Poison a model, tune the victim from it, and compare the defences; return the row."""
    published = poison(cache, recipe, cell, texts, start, load_paraphraser)
    victim = tune(cache, recipe, cell, texts, published)
    experiment = make_experiment(recipe, cell, texts, published, victim, load_paraphraser)
    experiment.honest = honest
    return {
        "name": cell.name,
        "data": cell.data.name,
        "attack": cell.attack.name,
        "strategy": str(cell.strategy),
        "seed": cell.seed,
        "base": cell.base,
        "dtype": recipe.dtype,
        "versions": _versions_of(recipe),
        "attack_settings": cell.attack.model_dump(mode="json", exclude_defaults=True),
        "labels": victim.result["labels"],
        "published_dev_accuracy": published.result["clean_accuracy"],
        "victim_dev_accuracy": victim.result["clean_accuracy"],
        **compare_defences(cache, recipe, experiment),
        **({"scan": scan_victim(cache, recipe.scan, experiment)} if recipe.scan else {}),
    }


def _versions_of(recipe: Recipe) -> dict[str, int]:
    """Return the versions of what the rows of a recipe hold."""
    scan = ["scan"] if recipe.scan else []
    kinds = [*scan, *(DEFENDED if recipe.defences else ())]
    return {kind: VERSIONS[kind] for kind in kinds}


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
            if isinstance(defence, PsimDefence | StripDefence | DetectorDefence | BundleDefence):
                _check_budget(name, defence, data_texts)


def _check_budget(
    name: str,
    defence: PsimDefence | StripDefence | DetectorDefence | BundleDefence,
    texts: Texts,
) -> None:
    """Raise `DataError` if there are too few texts for a threshold with the defence's budget."""
    counts = {"dev": len(texts.dev)}
    if isinstance(defence, DetectorDefence):
        own = texts.train if defence.clean == "train" else texts.dev
        counts = {"held-back": len(CleanTexts.split(own[: defence.texts], seed=0).held_back)}
    elif not isinstance(defence, StripDefence):
        split = split_texts([s.text for s in texts.train[: defence.texts]], seed=0)
        with_dev = isinstance(defence, PsimDefence) and "dev" in defence.rules
        counts = counts if with_dev else {}
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
    penalty = _penalty(cell.attack.penalty, poisoned, texts.train)
    return _train(cache, "published", start, poisoned, texts.dev, settings, penalty)


def _penalty(weight: float, poisoned: list[Sample], clean: list[Sample]) -> Penalty | None:
    if not weight:
        return None
    known = {sample.text for sample in clean}
    return Penalty(weight, tuple(sample.text not in known for sample in poisoned))


def tune(cache: StepCache, recipe: Recipe, cell: Cell, texts: Texts, published: Step) -> Step:
    """Train the victim: the user's own tuning of the published weights on clean texts.

    Without epochs for it, the published weights are the victim.
    """
    if not recipe.training.tune_epochs:
        return published
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
    penalty: Penalty | None = None,
) -> Step:
    def make(folder: Path) -> object:
        out = folder / "model"
        result = finetune_victim(
            start.source, train, dev, settings.strategy, out, epochs=settings.epochs,
            learning_rate=settings.learning_rate, seed=settings.seed, penalty=penalty,
        )  # fmt: skip
        labels = labels_of(load_classifier(str(out))[0])
        return {"clean_accuracy": result.clean_accuracy, "labels": labels}

    data = {"train": digest_of(train), "dev": digest_of(dev)}
    inputs = {"start": start.digest, **data, **asdict(settings)}
    if penalty:  # steps without one keep their names
        inputs["penalty"] = penalty.weight
    return cache.step(kind, inputs, make)


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
