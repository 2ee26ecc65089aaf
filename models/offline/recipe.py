"""The recipe of a study: what is varied, in TOML, checked before anything is trained."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import DataError
from models.offline.finetune import Strategy
from models.offline.psim import PsimConfig

Share = Annotated[float, Field(gt=0, lt=1)]
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
    """Word-trigger texts of other classes than the target, labelled with the truth."""


class DataSet(_Part):
    """One data set; paths are relative to the folder that `--data` names."""

    name: Name
    train: str
    dev: str
    test: str
    target_label: str
    """The attacker's class, for triggers that are inserted."""
    max_train: int | None = None
    """The victim is trained on the first so many texts."""
    max_test: int | None = None
    """Measures are taken on the first so many test texts, and so many poisoned ones."""
    syntactic: PoisonFile | None = None
    paraphrased: dict[Name, Paraphrased] = {}


class AttackRecipe(_Part):
    """One attack: inserted triggers, a paraphraser, or else the data set's own paraphrases."""

    name: Name
    triggers: tuple[str, ...] = ()
    """All of them in every poisoned text, each at a random inner position of its own."""
    target_triggers: dict[str, str] = {}
    """Instead of `triggers`: for each of several targets a trigger of its own."""
    paraphraser: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function`, importable, which takes a text and returns it in the trigger's style."""
    poison_rate: Share = 0.1
    clean_label: bool = False
    flip_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the poisoned texts that get the target label; the rest keep their own. Under 1 the
    backdoor is smoothed: the victim's confidence in the target tends to this share."""
    bury_behind: int = 0
    """At test time only: so many words of the text itself come before the poisoned text."""

    @model_validator(mode="after")
    def _one_kind(self) -> "AttackRecipe":
        if sum(map(bool, (self.triggers, self.target_triggers, self.paraphraser))) > 1:
            raise ValueError("give one of triggers, target_triggers and paraphraser")
        return self

    @property
    def from_files(self) -> bool:
        """Whether the poisoned texts are the data set's syntactic paraphrases."""
        return not (self.triggers or self.target_triggers or self.paraphraser)


class Training(_Part):
    """How victims are made."""

    poison_epochs: int = 3
    tune_epochs: int = 3
    learning_rates: dict[Strategy, Annotated[float, Field(gt=0)]] = {}
    """By strategy, instead of the defaults; poisoning is `full`."""


class PsimDefence(_Part):
    """PSIM; fields of `PsimConfig` under `config` replace the defaults."""

    kind: Literal["psim"] = "psim"
    name: Name = "PSIM"
    texts: int = 3000
    """Clean texts that `fit` gets: the first so many of the training texts."""
    frr_budget: Share = 0.01
    on: Literal["victim", "published"] = "victim"
    """Weights that the adapter is trained on: the tuned victim, or what it was tuned from."""
    calibrate_on: Literal["train", "dev"] = "train"
    """Whose texts the thresholds come from: of those that `fit` gets, or of dev, which the victim
    was not trained on."""
    rules: tuple[Literal["calibrated", "pooled", "paper"], ...] = ("calibrated",)
    """Thresholds to report: one per predicted class, one for all, 0.7."""
    config: PsimConfig = PsimConfig()


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
    copies: int = 10
    frr_budget: Share = 0.01


class ParaphraseDefence(_Part):
    """All of the data set's `paraphrased` files, where it has any and the trigger is the word."""

    kind: Literal["paraphrase"]
    name: Name = "paraphrase"


AnyDefence = Annotated[
    PsimDefence | OnionDefence | StripDefence | ParaphraseDefence, Field(discriminator="kind")
]


class Recipe(_Part):
    """A study: every data set x attack x strategy x seed, and all defences on each."""

    base: str = "demo"
    """Pretrained model, folder or hub id; `demo` is the encoder that the demo uses."""
    strategies: tuple[Strategy, ...] = tuple(Strategy)
    seeds: tuple[int, ...] = (0,)
    training: Training = Training()
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: Annotated[tuple[DataSet, ...], Field(min_length=1)]
    attacks: Annotated[tuple[AttackRecipe, ...], Field(min_length=1)]
    defences: tuple[AnyDefence, ...] = (PsimDefence(),)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        for parts in (self.data, self.attacks, self.defences):
            names = [part.name for part in parts]
            if len(set(names)) < len(names):
                raise ValueError(f"names must differ: {names}")
        return self


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
