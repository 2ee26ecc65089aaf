"""The recipe of a study: what is varied, in TOML, checked before anything is trained."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.bundle.manifest import Budget
from models.errors import DataError
from models.offline.attacks.poisoning import WORD_TRIGGER
from models.offline.attacks.strategy import Strategy
from models.offline.study.ablations import PsimVariant

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]
Name = Annotated[str, Field(min_length=1, pattern=r"^[\w .,%+-]+$")]


class _Part(BaseModel):
    """A table of the recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoisonFile(_Part):
    """Texts that a paraphraser wrote in the trigger's syntactic template."""

    train: str
    test: str
    target_label: str


class Paraphrased(_Part):
    """The test set after a paraphraser: the input of a defence that rewrites every text."""

    clean: str
    poisoned: str
    """Poisoned texts, labelled with the truth; those of the target class are left out."""
    triggers: tuple[str, ...] = (WORD_TRIGGER,)
    """What was inserted into the poisoned texts: only an attack with the same is compared."""


class DataSet(_Part):
    """One data set; paths are relative to the folder that `--data` names."""

    name: Name
    train: str
    dev: str
    test: str
    target_label: str
    """The attacker's class, for triggers that are inserted."""
    text_column: str = "text"
    label_column: str = "label"
    max_train: Count | None = None
    """The victim is trained on the first so many texts."""
    max_test: Count | None = None
    """Measures are taken on the first so many test texts, and so many poisoned ones."""
    syntactic: PoisonFile | None = None
    paraphrased: dict[Name, Paraphrased] = {}


class AttackRecipe(_Part):
    """One attack, of one kind: triggers, target_triggers, paraphraser, or syntactic."""

    name: Name
    triggers: tuple[Text, ...] = ()
    """All of them in every poisoned text, each at a random inner position of its own."""
    target_triggers: dict[str, Text] = {}
    """For each of several targets a trigger of its own."""
    paraphraser: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function`, importable, which takes a text and returns it in the trigger's style."""
    syntactic: bool = False
    """The data set's own paraphrases; data sets without are left out."""
    poison_rate: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """0 is the control: a victim without a backdoor, tested with the trigger all the same."""
    clean_label: bool = False
    flip_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the poisoned texts that get the target label; the rest keep their own. Under 1 the
    backdoor is smoothed: the victim's confidence in the target tends to this share."""
    bury_behind: Annotated[int, Field(ge=0)] = 0
    """At test time only: so many words of the text itself come before the poisoned text."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "AttackRecipe":
        kinds = (self.triggers, self.target_triggers, self.paraphraser, self.syntactic)
        if sum(map(bool, kinds)) != 1:
            raise ValueError("give one of triggers, target_triggers, paraphraser and syntactic")
        if self.syntactic and (self.clean_label or self.flip_share < 1 or self.bury_behind):
            raise ValueError("paraphrases from files are dirty-label, and taken as they are")
        if self.clean_label and self.flip_share < 1:
            raise ValueError("clean_label flips no label: flip_share has no meaning beside it")
        return self


class TrainingRecipe(_Part):
    """How victims are made."""

    poison_epochs: Count = 3
    tune_epochs: Count = 3
    learning_rates: dict[Strategy, Annotated[float, Field(gt=0)]] = {}
    """By strategy, instead of the defaults; poisoning is `full`."""


Rule = Literal["calibrated", "confidence", "dev", "pooled", "paper"]
RULES: dict[Rule, str] = {
    "calibrated": "",
    "confidence": ", confidence only",
    "dev": ", thresholds from dev texts",
    "pooled": ", one threshold",
    "paper": ", 0.7",
}


class PsimDefence(_Part):
    """PSIM; fields of `PsimVariant` under `config` replace the defaults."""

    kind: Literal["psim"] = "psim"
    name: Name = "PSIM"
    texts: Annotated[int, Field(ge=20)] = 3000
    """Clean texts that `fit` gets: the first so many of the training texts."""
    frr_budget: Budget = 0.01
    on: Literal["victim", "published"] = "victim"
    """Weights that the adapter is trained on: the tuned victim, or what it was tuned from."""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = ("calibrated",)
    """What to report: thresholds by class, from texts that `fit` held back; the same without the
    second screen; from dev texts, which the victim was not trained on; without the second screen,
    one threshold for all classes, or 0.7 as in the paper."""
    config: PsimVariant = PsimVariant()

    @field_validator("config")
    @classmethod
    def _no_seed(cls, config: PsimVariant) -> PsimVariant:
        if config.seed:
            raise ValueError("seeds are those of the recipe")
        return config

    @property
    def names(self) -> list[str]:
        """Names in the report, one for each rule."""
        return [self.name + RULES[rule] for rule in self.rules]


class OnionDefence(_Part):
    """ONION (Qi et al., EMNLP 2021)."""

    kind: Literal["onion"]
    name: Name = "ONION"
    language_model: str | None = None
    """Folder or hub id of a causal LM; without it a small one is trained on the clean texts."""


class StripDefence(_Part):
    """STRIP (Gao et al. 2021)."""

    kind: Literal["strip"]
    name: Name = "STRIP"
    copies: Count = 10
    frr_budget: Budget = 0.01


class ParaphraseDefence(_Part):
    """The data set's `paraphrased` files whose triggers are those of the attack."""

    kind: Literal["paraphrase"]


AnyDefence = Annotated[
    PsimDefence | OnionDefence | StripDefence | ParaphraseDefence, Field(discriminator="kind")
]


class Recipe(_Part):
    """A study: every data set x attack x strategy x seed, and all defences on each."""

    base: str = "demo"
    """Pretrained model, folder or hub id; `demo` is the encoder that the demo uses."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = tuple(Strategy)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    training: TrainingRecipe = TrainingRecipe()
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: Annotated[tuple[DataSet, ...], Field(min_length=1)]
    attacks: Annotated[tuple[AttackRecipe, ...], Field(min_length=1)]
    defences: tuple[AnyDefence, ...] = (PsimDefence(),)

    @model_validator(mode="after")
    def _nothing_twice(self) -> "Recipe":
        names = {
            "data": [part.name for part in self.data],
            "attacks": [part.name for part in self.attacks],
            "seeds": self.seeds,
            "strategies": self.strategies,
        }
        for data in self.data:
            names[f"defences on {data.name}"] = ["none", *self._defence_names(data)]
        for where, own in names.items():
            if len(set(own)) < len(own):
                raise ValueError(f"{where}: names must differ: {list(own)}")
        return self

    def _defence_names(self, data: DataSet) -> Iterator[str]:
        for defence in self.defences:
            match defence:
                case PsimDefence():
                    yield from defence.names
                case ParaphraseDefence():
                    yield from data.paraphrased
                case _:
                    yield defence.name


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        DataError: no such file, no TOML, or a field that is wrong; says which.
    """
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()
        )
        raise DataError(f"{path}: {problems}") from error
