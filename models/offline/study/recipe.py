"""The recipe of a study, in TOML, which is checked before anything is trained."""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.bundle.manifest import Budget
from models.errors import DataError
from models.offline.attacks.poisoning import WORD_TRIGGER, Firing
from models.offline.attacks.strategy import Strategy
from models.offline.study.ablations import PsimVariant

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]
Name = Annotated[str, Field(min_length=1, pattern=r"^[\w .,%+-]+$")]


class _RecipeTable(BaseModel):
    """A table of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoisonFile(_RecipeTable):
    """Files of texts that a paraphraser has written in the trigger's template or style."""

    train: str
    test: str
    target_label: str


class ParaphrasedTestSet(_RecipeTable):
    """Files of the test set, rewritten by a paraphraser: a defence that rewrites every text."""

    clean: str
    poisoned: str
    """Poisoned texts with their true labels; those of the target class are left out."""
    triggers: tuple[str, ...] = (WORD_TRIGGER,)
    """Triggers in the poisoned texts; the defence is tried only on attacks with the same ones."""


class DataSet(_RecipeTable):
    """One data set; paths are relative to the folder given as `--data`."""

    name: Name
    train: str
    dev: str
    test: str
    target_label: str
    """The attacker's class for inserted triggers."""
    text_column: str = "text"
    label_column: str = "label"
    max_train: Count | None = None
    """Number of training texts, taken from the beginning; all by default."""
    max_dev: Count | None = None
    """Number of dev texts, taken from the beginning; all by default."""
    max_test: Count | None = None
    """Number of clean and of poisoned test texts, taken from the beginning; all by default."""
    syntactic: PoisonFile | None = None
    style: PoisonFile | None = None
    paraphrased: dict[Name, ParaphrasedTestSet] = {}


class AttackRecipe(_RecipeTable):
    """One attack of one kind: triggers, target_triggers, paraphraser, syntactic or style."""

    name: Name
    data: tuple[Name, ...] = ()
    """Names of the data sets that it is tried on; all by default."""
    triggers: tuple[Text, ...] = ()
    """Triggers that every poisoned text contains, each at its own random inner position."""
    target_triggers: dict[str, Text] = {}
    """Trigger of each target label."""
    paraphraser: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function`, importable, which rewrites a text in the trigger's style."""
    syntactic: bool = False
    """Whether to use the paraphrases of the data set; data sets without any are left out."""
    style: bool = False
    """The same with the files of texts in another style."""
    fires: Firing = "anywhere"
    """Where the trigger fires. Other than `anywhere`, the training set also has as many texts in
    which it does not fire, with their true labels; see `decoys`."""
    poison_rate: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of poisoned training texts; 0 is the control: a clean victim, tested with triggers."""
    clean_label: bool = False
    flip_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the poisoned texts that get the target label; the others keep their own. Under 1,
    the backdoor is smoothed: the victim's confidence in the target tends to this share."""
    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a penalty in the attacker's training: how far the hidden states of texts with the
    trigger lie from those of clean texts, see `PenaltyTrainer`."""
    bury_behind: Annotated[int, Field(ge=0)] = 0
    """Number of words of the text that are put before the poisoned text, at test time only."""
    together: Name | None = None
    """Attacks with the same name here are planted in one victim, each in its own share of the
    training texts. `poison_rate` stays a share of all of them."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "AttackRecipe":
        kinds = (
            *(self.triggers, self.target_triggers, self.paraphraser),
            *(self.syntactic, self.style),
        )
        if sum(map(bool, kinds)) != 1:
            raise ValueError(
                "give one of triggers, target_triggers, paraphraser, syntactic and style"
            )
        if self.files and (self.clean_label or self.flip_share < 1 or self.bury_behind):
            raise ValueError("paraphrases from files are dirty-label, and taken as they are")
        if self.fires != "anywhere" and (self.clean_label or not self.triggers):
            raise ValueError("fires needs triggers that are dirty-label")
        if self.together and (self.penalty or not self.poison_rate):
            raise ValueError("what is planted together has a poison rate, and no penalty")
        if self.clean_label and self.flip_share < 1:
            raise ValueError("clean_label flips no label: flip_share has no meaning beside it")
        return self

    @property
    def files(self) -> Literal["syntactic", "style"] | None:
        """Field of the data set with the files of this attack; None if it needs none."""
        return "syntactic" if self.syntactic else "style" if self.style else None


class TrainingRecipe(_RecipeTable):
    """Epochs and learning rates of the victims."""

    poison_epochs: Count = 3
    tune_epochs: Annotated[int, Field(ge=0)] = 3
    """0: the victim is the published weights, without any tuning; there is only one strategy."""
    learning_rates: dict[Strategy, Annotated[float, Field(gt=0)]] = {}
    """Rates that replace the defaults, by strategy; poisoning uses that of `full`."""


Rule = Literal["calibrated", "confidence", "dev", "pooled", "paper"]
RULES: dict[Rule, str] = {
    "calibrated": "",
    "confidence": ", confidence only",
    "dev": ", thresholds from dev texts",
    "pooled": ", one threshold",
    "paper": ", 0.7",
}


class PsimDefence(_RecipeTable):
    """PSIM; fields of `PsimVariant` under `config` replace the defaults."""

    kind: Literal["psim"] = "psim"
    name: Name = "PSIM"
    texts: Annotated[int, Field(ge=20)] = 3000
    """Clean texts that `fit` gets: the first so many of the training texts."""
    frr_budget: Budget = 0.01
    on: Literal["victim", "published"] = "victim"
    """Weights that the adapter is trained on: the tuned victim, or those it was tuned from."""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = ("calibrated",)
    """Rules for thresholds, each reported by itself. `calibrated`: thresholds by class, from texts
    that `fit` held back. `confidence`: the same without the second screen. `dev`: from dev texts,
    which the victim was not trained on. `pooled`: one threshold for all classes, without the second
    screen. `paper`: 0.7 as in the paper, without the second screen."""
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


class OnionDefence(_RecipeTable):
    """ONION (Qi et al., EMNLP 2021)."""

    kind: Literal["onion"]
    name: Name = "ONION"
    language_model: str | None = None
    """Folder or hub id of a causal LM; by default, a small one is trained on the clean texts."""


class StripDefence(_RecipeTable):
    """STRIP (Gao et al. 2021)."""

    kind: Literal["strip"]
    name: Name = "STRIP"
    copies: Count = 10
    frr_budget: Budget = 0.01


DETECTORS = {
    "badacts": "BadActs",
    "dan": "DAN",
    "dan-mean": "DAN, mean of tokens",
    "dup": "DUP",
    "lcf": "LCF",
    "rap": "RAP",
}


class DetectorDefence(_RecipeTable):
    """A detector from the literature: see `defences/activations.py` and `defences/rap.py`."""

    kind: Literal["badacts", "dan", "dan-mean", "dup", "lcf", "rap"]
    name: Name = Field(default_factory=lambda known: DETECTORS[known["kind"]])
    clean: Literal["train", "dev"] = "train"
    """Where its clean texts come from: as PSIM's, or, as in the papers, not trained on."""
    texts: Annotated[int, Field(ge=40)] = 3000
    """Number of them, taken from the beginning; half are for the threshold."""
    frr_budget: Budget = 0.01


class ParaphraseDefence(_RecipeTable):
    """The `paraphrased` files of the data set whose triggers are those of the attack."""

    kind: Literal["paraphrase"]


class BundleDefence(_RecipeTable):
    """PSIM as it is served: the bundle that `psim fit` writes, and its verdicts."""

    kind: Literal["bundle"]
    name: Name = "PSIM"
    texts: Annotated[int, Field(ge=20)] = 3000
    """Clean texts that `fit` gets: the first so many of the training texts."""
    frr_budget: Budget = 0.01
    layers: Count = 1
    """Number of topmost layers that carry the adapters."""
    thorough: bool = False
    """Whether its outcome is also measured with an override test of every text, which takes many
    times as long."""


AnyDefence = Annotated[
    PsimDefence | OnionDefence | StripDefence | DetectorDefence | ParaphraseDefence | BundleDefence,
    Field(discriminator="kind"),
]


class HonestRecipe(_RecipeTable):
    """Honest traffic unlike the fitting texts, which what rejects is tried on: `honest_sets`."""

    texts: Count = 200
    """Number of texts of each kind."""
    others: dict[Name, str] = {}
    """Files of clean texts of other tasks, by name; that of the victim's own task is left out."""


class ScanRecipe(_RecipeTable):
    """A scan of every victim for what forces a class, as `psim scan` does it."""

    texts: Annotated[int, Field(ge=20)] = 3000
    """Clean texts that it gets: the first so many of the training texts."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Time for the search; by default, as much as it takes."""


class Recipe(_RecipeTable):
    """A study: every base x data set x attack x strategy x seed, and all defences on each."""

    base: Text = "demo"
    """Folder or hub id of a pretrained model, or the name of a base that a package carries (see
    `models/offline/io/bases.py`); `demo` is the encoder of the demo, which is `minilm`."""
    bases: tuple[Text, ...] = ()
    """Several of them, in place of `base`. Those whose packages are not installed are left out."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = tuple(Strategy)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    training: TrainingRecipe = TrainingRecipe()
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: Annotated[tuple[DataSet, ...], Field(min_length=1)]
    attacks: Annotated[tuple[AttackRecipe, ...], Field(min_length=1)]
    defences: tuple[AnyDefence, ...] = (PsimDefence(),)
    honest: HonestRecipe | None = None
    scan: ScanRecipe | None = None

    @property
    def all_bases(self) -> tuple[str, ...]:
        """The pretrained models."""
        return self.bases or (self.base,)

    def with_bases(self, bases: Sequence[str]) -> "Recipe":
        """Return the same recipe for other bases, each once."""
        return self.model_copy(update={"bases": tuple(dict.fromkeys(bases))})

    @model_validator(mode="after")
    def _nothing_twice(self) -> "Recipe":
        names = {
            "data": [part.name for part in self.data],
            "attacks": [part.name for part in self.attacks],
            "bases": self.bases,
            "seeds": self.seeds,
            "strategies": self.strategies,
        }
        for data in self.data:
            names[f"defences on {data.name}"] = ["none", *self._defence_names(data)]
        for where, values in names.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{where}: names must differ: {list(values)}")
        if not self.training.tune_epochs and len(self.strategies) > 1:
            raise ValueError("with tune_epochs = 0, strategies do not differ; give one")
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
        DataError: the file is missing or no TOML, or a field is wrong; the message says which.
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
