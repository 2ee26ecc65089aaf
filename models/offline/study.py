"""The study of Zhao et al.: what attacks leave in tuned victims, and what each defence stops.

Read `run_study`: data sets x attacks x strategies x seeds, each cell from top to bottom. Every step
is kept under a digest of its inputs (`store.py`), so that an interrupted study goes on where it was
and a changed recipe redoes only what it touches.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import DataError
from models.offline.attack import (
    WORD_TRIGGER,
)
from models.offline.case import Case
from models.offline.cells import Cell, Texts, cells, poisoned_test_texts, poisoned_training_texts
from models.offline.contest import contest
from models.offline.data import Sample
from models.offline.demo import encoder_path
from models.offline.finetune import Strategy, finetune_victim
from models.offline.fit import labels_of
from models.offline.recipe import Recipe
from models.offline.store import Step, Store, digest_of
from models.offline.victim import load_classifier

ROWS = "rows.jsonl"


def run_study(
    recipe: Recipe, root: Path, out: Path, store: Store, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Run a study and return its rows, one per cell; they are also kept in `out/rows.jsonl`.

    Args:
        recipe: what is varied.
        root: folder that the recipe's paths are relative to.
        out: folder for results.
        store: where the steps are kept; studies that have steps in common may share one.
        say: called with a line whenever a cell begins.

    Raises:
        DataError, VictimError, CalibrationError: as their messages say.
    """
    base = _base(recipe.base)
    out.mkdir(parents=True, exist_ok=True)
    if not (planned := list(cells(recipe))):
        raise DataError("nothing to do: no data set of the recipe has syntactic paraphrases")
    texts = {data.name: Texts.load(data, root) for data in recipe.data}  # complain early
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {cell}")
        own = texts[cell.data.name]
        published = poison(store, recipe, cell, own, base)
        victim = tune(store, recipe, cell, own, published)
        case = make_case(recipe, cell, own, published, victim)
        rows.append(
            {
                "data": cell.data.name,
                "attack": cell.attack.name,
                "strategy": str(cell.strategy),
                "seed": cell.seed,
                "labels": victim.result["labels"],
                "published_dev_accuracy": published.result["clean_accuracy"],
                "victim_dev_accuracy": victim.result["clean_accuracy"],
                **contest(store, recipe, case),
            }
        )
        _write_rows(out / ROWS, rows)
    return rows


def poison(store: Store, recipe: Recipe, cell: Cell, texts: Texts, base: Path | str) -> Step:
    """Make the weights that the attacker publishes: full fine-tuning on a poisoned set."""
    start = str(base), _weights_digest(base)
    poisoned = poisoned_training_texts(cell, texts), texts.dev
    epochs = recipe.training.poison_epochs
    return _train(store, "published", recipe, start, poisoned, Strategy.FULL, epochs, cell.seed)


def tune(store: Store, recipe: Recipe, cell: Cell, texts: Texts, published: Step) -> Step:
    """Make the victim: the user's own tuning on clean texts."""
    start = str(published.folder / "model"), published.key
    clean, epochs = (texts.train, texts.dev), recipe.training.tune_epochs
    return _train(store, "victim", recipe, start, clean, cell.strategy, epochs, cell.seed)


def _train(
    store: Store,
    kind: str,
    recipe: Recipe,
    start: tuple[str, str],
    texts: tuple[list[Sample], list[Sample]],
    strategy: Strategy,
    epochs: int,
    seed: int,
) -> Step:
    """Train from a model, named by path and digest, on train and dev texts."""
    rate = recipe.training.learning_rates.get(strategy)

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
        "epochs": epochs,
        "seed": seed,
    }
    return store.step(kind, inputs | ({"learning_rate": rate} if rate else {}), make)


def make_case(recipe: Recipe, cell: Cell, texts: Texts, published: Step, victim: Step) -> Case:
    """Gather what the defences get to see of a cell, and what they are measured on."""
    poisoned = poisoned_test_texts(cell, texts)
    word = cell.attack.triggers == (WORD_TRIGGER,)
    return Case(
        victim=victim,
        published=published,
        train=texts.train,
        dev=texts.dev,
        clean=texts.test,
        poisoned=[text for text, _ in poisoned],
        targets=[target for _, target in poisoned],
        paraphrased=texts.paraphrased if word else {},
        seed=cell.seed,
        dtype=recipe.dtype,
    )


def _base(name: str) -> Path | str:
    return encoder_path() if name == "demo" else name


def _weights_digest(base: Path | str) -> str:
    """Return a digest of a model folder's weights; of a hub id, its name must do."""
    files = sorted(Path(base).glob("*.safetensors"))
    digest = hashlib.sha256(str(base).encode() if not files else b"")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
