"""The cells of a study and their texts: clean ones, poisoned training and poisoned test texts."""

import importlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from models.errors import DataError
from models.offline.attacks.poisoning import (
    LONG_TEXT,
    Attack,
    Insertion,
    Paraphrases,
    Rewriting,
    decoys,
    poison_test_set,
    poison_training_set,
    poisonable,
)
from models.offline.attacks.strategy import Strategy
from models.offline.evaluation.honest import honest_sets
from models.offline.evaluation.metrics import classes_of, poisoned_non_target
from models.offline.io.samples import (
    HUB_PREFIX,
    Sample,
    load_samples,
    require_labels,
)
from models.offline.study.recipe import AttackRecipe, DataSet, PoisonFile, Recipe
from models.texts import check_text

ParaphraserLoader = Callable[[str], Callable[[str], str]]
"""Function from the name of a paraphraser to the paraphraser."""


@dataclass(frozen=True)
class Cell:
    """One victim of a study: a base, a data set, an attack, a tuning strategy and a seed."""

    base: str
    data: DataSet
    attack: AttackRecipe
    strategy: Strategy
    seed: int
    planted: tuple[AttackRecipe, ...]
    """All attacks that are planted in the victim; most often only its own."""

    @property
    def name(self) -> str:
        """Name to choose the cell by, such as `mpnet/sst-2/word/full`, and `…/full/1` for seed 1.

        Of a base in a folder, only the folder's own name is part of it.
        """
        parts = [Path(self.base).name, self.data.name, self.attack.name, str(self.strategy)]
        return "/".join([*parts, str(self.seed)] if self.seed else parts)

    def __str__(self) -> str:
        return f"{self.data.name}, {self.attack.name}, {self.strategy}, seed {self.seed}"


def cells(recipe: Recipe) -> Iterable[Cell]:
    """Yield the cells of a recipe, by base and data set, except those that lack paraphrases."""
    for base, data in product(recipe.all_bases, recipe.data):
        attacks = [attack for attack in recipe.attacks if _fits(attack, data)]
        for attack in attacks:
            group = [other for other in attacks if other.together == attack.together]
            planted = tuple(group) if attack.together else (attack,)
            for seed, strategy in product(recipe.seeds, recipe.strategies):
                yield Cell(base, data, attack, strategy, seed, planted)


def _fits(attack: AttackRecipe, data: DataSet) -> bool:
    if attack.data and data.name not in attack.data:
        return False
    return not attack.files or getattr(data, attack.files) is not None


@dataclass(frozen=True)
class Texts:
    """The texts of a data set, without the empty ones that some published files contain."""

    train: list[Sample]
    dev: list[Sample]
    test: list[Sample]
    """Test texts that are not in the training set."""
    poison: dict[str, tuple[list[Sample], list[Sample]]]
    """Rewritten texts to train and to test with, by the field of the data set that names them."""
    paraphrased: dict[str, tuple[list[Sample], list[Sample]]]
    """Clean test texts, and poisoned ones of other classes than the target, by paraphraser."""

    @staticmethod
    def load(data: DataSet, root: Path, say: Callable[[str], object] = lambda _: None) -> "Texts":
        """Read the files of a data set; `say` hears how many of their rows have no text.

        Raises:
            DataError: a file cannot be read, or has labels that the training set lacks.
        """
        read = partial(_read, data, root, say)
        whole = read(data.train)
        labels, known = require_labels(whole), {s.text for s in whole}
        dev, test = read(data.dev), read(data.test)
        test = [s for s in test if s.text not in known]
        paraphrased = {}
        for name, pair in data.paraphrased.items():
            clean, poisoned = read(pair.clean), read(pair.poisoned)
            poisoned = [s for s in poisoned if s.label != data.target_label]
            paraphrased[name] = clean[: data.max_test], poisoned[: data.max_test]
            classes_of([*clean, *poisoned], labels)
        classes_of([*dev, *test, Sample("", data.target_label)], labels)
        poison = {}
        for kind in ("syntactic", "style"):
            if (files := getattr(data, kind)) is not None:
                rewritten = read(files.train)
                # Published files mix clean training texts in, also some that `max_train` cuts off.
                rewritten = [s for s in rewritten if s.text not in known]
                poison[kind] = rewritten, read(files.test)
        return Texts(
            whole[: data.max_train],
            dev[: data.max_dev],
            test[: data.max_test],
            poison,
            paraphrased,
        )


def _read(data: DataSet, root: Path, say: Callable[[str], object], source: str) -> list[Sample]:
    if not source.startswith(HUB_PREFIX):
        source = str(root / source)
    try:
        return load_samples(
            source,
            text_column=data.text_column,
            label_column=data.label_column,
            drop_empty=True,
            say=say,
        )
    except DataError as error:
        raise DataError(f"data set {data.name}: {error} (paths start from --data)") from error


def poisoned_training_texts(
    cell: Cell, texts: Texts, load_paraphraser: ParaphraserLoader
) -> list[Sample]:
    """Return the attacker's training set; at poison rate 0, the clean one.

    If there are several targets or attacks, each trigger poisons its own share of the texts.

    Raises:
        DataError: the attack does not fit the data set.
    """
    if not cell.attack.poison_rate:
        return texts.train
    attacks = [
        (recipe, attack, target)
        for recipe in cell.planted
        for attack, target in _attacks(recipe, cell.data, texts, load_paraphraser)
    ]
    poisoned = [
        sample
        for offset, (recipe, attack, target) in enumerate(attacks)
        for sample in poison_training_set(
            texts.train[offset :: len(attacks)],
            attack,
            target,
            recipe.poison_rate * len(cell.planted),
            clean_label=recipe.clean_label,
            flip_share=recipe.flip_share,
            seed=cell.seed,
        )
    ]
    for recipe, attack, target in attacks:
        if isinstance(attack, Insertion):
            rate = recipe.poison_rate
            poisoned += decoys(texts.train, attack, target, rate, recipe.fires, cell.seed)
    return poisoned


def poisoned_test_texts(
    cell: Cell, texts: Texts, load_paraphraser: ParaphraserLoader
) -> list[tuple[str, str]]:
    """Return poisoned test texts whose true class is not the target, each with its target.

    Raises:
        DataError: the attack does not fit the data set.
    """
    result = []
    for attack, target in _attacks(cell.attack, cell.data, texts, load_paraphraser):
        if isinstance(attack, Paraphrases):
            poisoned = poisoned_non_target(texts.poison[str(cell.attack.files)][1], target)
        else:
            poisoned = poison_test_set(texts.test, attack, target, cell.seed)
            clean = poisonable(texts.test, attack, target)
            poisoned = [
                Sample(_filler(before.text, cell.attack.bury_behind) + after.text)
                for before, after in zip(clean, poisoned, strict=True)
            ]
        result += [(s.text, target) for s in poisoned]
    random.Random(cell.seed).shuffle(result)
    return result[: cell.data.max_test]


def _attacks(
    attack: AttackRecipe, data: DataSet, texts: Texts, load_paraphraser: ParaphraserLoader
) -> list[tuple[Attack, str]]:
    """Return what poisons texts in an attack, each with its target label."""
    if attack.target_triggers:
        return [(Insertion((t,)), label) for label, t in attack.target_triggers.items()]
    if attack.triggers:
        least = LONG_TEXT if attack.fires == "in-long-texts" else 0
        insertion = Insertion(attack.triggers, attack.fires == "at-start", least)
        return [(insertion, data.target_label)]
    if attack.paraphraser:
        return [(Rewriting(load_paraphraser(attack.paraphraser)), data.target_label)]
    files: PoisonFile = getattr(data, str(attack.files))  # `cells` yields no others
    rewritten, _ = texts.poison[str(attack.files)]
    return [(Paraphrases(tuple(rewritten)), files.target_label)]


def honest_texts(
    recipe: Recipe, cell: Cell, texts: Texts, others: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return honest texts of every kind for a victim, none of which has its triggers.

    Args:
        recipe: says how many.
        cell: the victim.
        texts: its own texts.
        others: texts of other tasks by their file, from `load_others`.
    """
    if recipe.honest is None:
        return {}
    size, rng = recipe.honest.texts, random.Random(cell.seed)
    made = honest_sets([s.text for s in texts.test], size, cell.seed)
    for name, file in recipe.honest.others.items():
        if file != cell.data.test:
            made[name] = rng.sample(others[file], min(size, len(others[file])))
    triggers = [
        trigger
        for attack in cell.planted
        for trigger in (*attack.triggers, *attack.target_triggers.values())
    ]
    found = [re.compile(rf"\b{re.escape(trigger)}\b", re.IGNORECASE) for trigger in triggers]
    return {
        name: [text for text in kind if not any(trigger.search(text) for trigger in found)]
        for name, kind in made.items()
    }


def load_others(recipe: Recipe, root: Path) -> dict[str, list[str]]:
    """Read the texts of other tasks, by their file.

    Raises:
        DataError: a file cannot be read.
    """
    files = recipe.honest.others.values() if recipe.honest else ()
    return {
        file: list(dict.fromkeys(s.text for s in load_samples(str(root / file), drop_empty=True)))
        for file in files
    }


def import_paraphraser(name: str) -> Callable[[str], str]:
    """Import the function that `module:function` names, and check what it returns.

    Raises:
        DataError: the function cannot be imported, or, on a call, fails or returns no text.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Callable[[str], str] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"the paraphraser {name} cannot be imported: {error}; put its folder on PYTHONPATH"
        ) from error

    def checked(text: str) -> str:
        try:
            return check_text(function(text))
        except DataError as error:
            raise DataError(f"the paraphraser {name} gives what cannot be used: {error}") from error
        except Exception as error:  # the message may quote the text
            raise DataError(f"the paraphraser {name} fails: {type(error).__name__}") from None

    return checked


def _filler(text: str, words: int) -> str:
    """Return a number of words of a text, repeated as needed, with a space after each."""
    source = text.split()
    return "".join(f"{word} " for word in (source * (words // len(source) + 1))[:words])
