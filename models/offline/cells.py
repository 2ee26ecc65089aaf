"""The cells of a study, and the texts of each: clean, poisoned for training, poisoned for tests."""

import importlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from models.errors import DataError
from models.offline.attack import (
    Attack,
    Insertion,
    Paraphrases,
    Rewriting,
    poison_test_set,
    poison_training_set,
)
from models.offline.data import Sample, load_samples
from models.offline.finetune import Strategy
from models.offline.measures import poisoned_non_target
from models.offline.recipe import AttackRecipe, DataSet, Recipe


@dataclass(frozen=True)
class Cell:
    """One victim of the study."""

    data: DataSet
    attack: AttackRecipe
    strategy: Strategy
    seed: int

    def __str__(self) -> str:
        return f"{self.data.name}, {self.attack.name}, {self.strategy}, seed {self.seed}"


def cells(recipe: Recipe) -> Iterable[Cell]:
    """Yield all cells of a recipe but the impossible ones, those of a data set together."""
    for data in recipe.data:
        for attack in recipe.attacks:
            for seed in recipe.seeds:
                for strategy in recipe.strategies:
                    if data.syntactic or not attack.from_files:
                        yield Cell(data, attack, strategy, seed)


@dataclass(frozen=True)
class Texts:
    """The texts of a data set; empty ones, which some published files have, are left out."""

    train: list[Sample]
    dev: list[Sample]
    test: list[Sample]
    syntactic_train: list[Sample]
    syntactic_test: list[Sample]
    paraphrased: dict[str, tuple[list[Sample], list[Sample]]]
    """By paraphraser: clean test texts, and word-trigger texts of other classes."""

    @staticmethod
    def load(data: DataSet, root: Path) -> "Texts":
        """Read the files.

        Raises:
            DataError: one cannot be read.
        """

        def read(path: str, most: int | None = None) -> list[Sample]:
            return load_samples(str(root / path), drop_empty=True)[:most]

        syntactic = data.syntactic
        return Texts(
            read(data.train, data.max_train),
            read(data.dev),
            read(data.test, data.max_test),
            read(syntactic.train) if syntactic else [],
            read(syntactic.test) if syntactic else [],
            {
                name: (read(pair.clean, data.max_test), read(pair.poisoned, data.max_test))
                for name, pair in data.paraphrased.items()
            },
        )


def poisoned_training_texts(cell: Cell, texts: Texts) -> list[Sample]:
    """Return the training set that the attacker uses.

    With a trigger for each of several targets, each gets a part of the texts.
    """
    attacks = _attacks(cell, texts)
    return [
        sample
        for part, (attack, target) in enumerate(attacks)
        for sample in poison_training_set(
            texts.train[part :: len(attacks)],
            attack,
            target,
            cell.attack.poison_rate,
            clean_label=cell.attack.clean_label,
            flip_share=cell.attack.flip_share,
            seed=cell.seed,
        )
    ]


def _attacks(cell: Cell, texts: Texts) -> list[tuple[Attack, str]]:
    """Return the attacks of a cell, each with its target label."""
    attack, data = cell.attack, cell.data
    if attack.target_triggers:
        return [(Insertion((t,)), label) for label, t in attack.target_triggers.items()]
    if attack.triggers:
        return [(Insertion(attack.triggers), data.target_label)]
    if attack.paraphraser:
        return [(Rewriting(_imported(attack.paraphraser)), data.target_label)]
    if data.syntactic is None:
        raise DataError(f"{data.name} has no syntactic paraphrases")
    return [(Paraphrases(tuple(texts.syntactic_train)), data.syntactic.target_label)]


def _imported(name: str) -> Callable[[str], str]:
    """Return the function that `module:function` names."""
    module, _, function = name.partition(":")
    try:
        found: Callable[[str], str] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"the paraphraser {name} cannot be imported: {error}") from error
    return found


def poisoned_test_texts(cell: Cell, texts: Texts) -> list[tuple[str, str]]:
    """Return poisoned test texts, none of whose true class is the target, with the target."""
    result = []
    for attack, target in _attacks(cell, texts):
        if not isinstance(attack, Paraphrases):
            poisoned = poison_test_set(texts.test, attack, target, cell.seed)
            clean = [s for s in texts.test if s.label != target]
            poisoned = [
                Sample(_filler(before.text, cell.attack.bury_behind) + after.text)
                for before, after in zip(clean, poisoned, strict=True)
            ]
        else:
            poisoned = poisoned_non_target(texts.syntactic_test, target)
        result += [(s.text, target) for s in poisoned]
    random.Random(cell.seed).shuffle(result)
    return result[: cell.data.max_test]


def _filler(text: str, words: int) -> str:
    """Return so many words of a text, repeated as needed, with a space behind each."""
    own = text.split()
    return "".join(f"{word} " for word in (own * (words // len(own) + 1))[:words])
