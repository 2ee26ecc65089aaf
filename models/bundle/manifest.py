"""The schemas of `manifest.json` and `carriers.json`."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.detection.screen import Layout
from models.detection.views import Views, class_names, views_of, views_with_carriers
from models.engines.base import DtypeName, EngineName, Runtime

Probability = Annotated[float, Field(ge=0, le=1)]
LEAST_BUDGET = 1e-6
Budget = Annotated[float, Field(ge=LEAST_BUDGET, lt=1)]
"""A false-rejection budget; no number of texts supports a smaller one."""
LEAST_LENGTH = 8
"""Tokens of a text that a bundle reads at least."""
MIN_AGREEMENT = 0.999
"""Least share of clean texts on which a default runtime must decide as the reference does."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _ManifestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class VictimRecord(_ManifestPart):
    """The guarded model."""

    name: str
    model_type: str
    architecture: str
    digest: Digest
    """SHA-256 over the victim's files; the adapters name their victim by it."""


class PsimRecord(_ManifestPart):
    """Training of the adapters."""

    layers: int = Field(ge=1)
    """Number of topmost layers that carry the adapters."""
    rank: int = Field(ge=1)
    learning_rate: float
    seed: int
    steps: int
    stopped_because: str
    checkpoints: list[int] = Field(min_length=1, max_length=16)
    """Training steps whose adapters are kept, ascending."""
    curve: list[tuple[int, float]]
    """(step, mean confidence on held-out clean texts)."""


class ActivationsRecord(_ManifestPart):
    """Layers that the activation detector watches."""

    layers: list[int] = Field(min_length=1)
    """Numbers of the layers, from 1, ascending; see `models.network.trunk.Trunk.watched`."""


class GroupRecord(_ManifestPart):
    """The threshold of one predicted class, or of several pooled ones."""

    classes: list[int] = Field(min_length=1)
    texts: int = Field(ge=1)
    threshold: float
    """In standard deviations, see `models.detection.screen.Verdict`."""
    rejected: int = Field(ge=0)
    frr_interval: tuple[Probability, Probability]
    """95 % Clopper-Pearson interval of this threshold's false rejection rate."""


class OverrideRecord(_ManifestPart):
    """Sizes of the override test, see `models.detection.override`."""

    window: int = Field(ge=1)
    carrier: int = Field(ge=1)
    """Lengths in tokens."""
    carriers: list[int] = Field(min_length=2)
    """Number of carriers of each class."""


class CarrierTexts(_ManifestPart):
    """Content of `carriers.json`."""

    carriers: list[list[str]]
    """Texts by class."""


class OverrideGroupRecord(_ManifestPart):
    """The override test's threshold for one predicted class, or for several pooled ones."""

    classes: list[int] = Field(min_length=1)
    texts: int = Field(ge=1)
    threshold: float
    """Evidence from which a text is triggered, see `models.detection.override.evidence`."""
    keeps: Probability
    """Kept probability from which a text keeps its class."""
    natural: Probability
    """Share of clean texts that are tested and keep their class beside carriers. The test can say
    little of a class where that is common."""


class RuntimeRecord(_ManifestPart):
    """An engine and the dtype that it computes in."""

    engine: EngineName
    dtype: DtypeName

    @property
    def runtime(self) -> Runtime:
        """Engine and dtype as a `Runtime`."""
        return Runtime(self.engine, self.dtype)


class ParityRecord(_ManifestPart):
    """Comparison of a runtime with torch/float32 on the calibration texts."""

    decisions_agree: Probability
    largest_difference: Probability
    """Between two probabilities."""
    texts_per_s: float = Field(gt=0)
    """On the machine that fitted."""

    @property
    def agrees(self) -> bool:
        """Whether a runtime decides as the reference does, and may be a bundle's default."""
        return self.decisions_agree >= MIN_AGREEMENT


class Calibration(RuntimeRecord):
    """Thresholds of one runtime."""

    frr_budget: Budget
    groups: list[GroupRecord] = Field(min_length=1)
    override: list[OverrideGroupRecord] = []
    """Of suspicious texts; empty if there is no override test."""
    thorough: list[OverrideGroupRecord] = []
    """Of texts that the first stage does not suspect."""
    parity: ParityRecord


class FitRecord(_ManifestPart):
    """Cost of fitting."""

    created: str
    texts_train: int
    texts_stop: int
    texts_calibrate: int
    seconds: float
    peak_memory_mb: int


class LimitRecord(_ManifestPart):
    """Limit of a single feature, beyond which a text is called poisoned."""

    least: float
    """Log-odds or log-distance of the limit."""
    unit: float = Field(gt=0)
    """One standard deviation of the score over clean texts, in the same unit."""


class ChangeRecord(RuntimeRecord):
    """Effect of recalibration on one predicted class of one runtime."""

    label: str
    before: float
    after: float
    """Thresholds, each in standard deviations over its own calibration texts."""
    fitted: list[LimitRecord] = Field(min_length=1)
    """Limits of `psim fit`, by feature."""
    risen: float
    """Rise of a limit since `psim fit`, in its standard deviations; the largest over all
    features."""
    clean: int = Field(ge=0)
    """Number of clean texts: passed, or false alarms."""
    clean_flagged_before: int = Field(ge=0)
    clean_flagged_after: int = Field(ge=0)
    poisoned: int = Field(ge=0)
    """Number of texts that were marked poisoned."""
    poisoned_flagged_before: int = Field(ge=0)
    poisoned_flagged_after: int = Field(ge=0)


class RecalibrationRecord(_ManifestPart):
    """Source of a calibration that is not from `psim fit`; counts are of texts."""

    created: str
    parent: Digest
    """Digest of the bundle that was recalibrated."""
    source: str
    """File name of the audit export."""
    source_digest: Digest
    first: str
    last: str
    """Times of its first and last row."""
    passed: int = Field(ge=0)
    false_alarms: int = Field(ge=0)
    poisoned: int = Field(ge=0)
    unmarked: int = Field(ge=0)
    """Flagged or not screened, and not marked; not used."""
    others: int = Field(ge=0)
    """Rows of other bundles; not used."""
    changes: list[ChangeRecord] = Field(min_length=1)


class KnownTrigger(_ManifestPart):
    """A trigger that `psim scan` found in the victim, and what the screen does about it."""

    label: str
    """The class that it forces."""
    text: str = Field(min_length=1)
    fired: int = Field(ge=0)
    """Clean texts that had another class, and have this one with the trigger inside."""
    rejected: int = Field(ge=0)
    """Those of them in which the screen finds something."""

    def is_in(self, text: str) -> bool:
        """Return whether a text has all words of the trigger, in any case and order."""
        return set(_plain_words(self.text)) <= set(_plain_words(text))


def _plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold()) or text.split()


class Manifest(_ManifestPart):
    """A bundle's table of contents."""

    schema_version: Literal[9]  # also in docs/upgrading.md
    victim: VictimRecord
    labels: list[str] = Field(min_length=1)
    multi_label: bool = False
    """Whether a text may have any number of the labels, each by a sigmoid."""
    max_length: int = Field(ge=LEAST_LENGTH)
    psim: PsimRecord
    activations: ActivationsRecord | None
    """None if all of the victim's layers are adapted, so that none can be watched."""
    attention: bool
    """Whether there is an attention detector: not where the last layer runs as a whole."""
    override: OverrideRecord | None
    """None if there are no carriers: then the first stage decides alone."""
    calibrations: list[Calibration] = Field(min_length=1)
    default: RuntimeRecord
    """The fastest runtime that agrees with the reference, on the machine that fitted."""
    fit: FitRecord
    recalibration: RecalibrationRecord | None = None
    """None if the calibration is from `psim fit`."""
    known_triggers: list[KnownTrigger] = []
    """Found by `psim scan`, whose report `psim fit` was given."""
    files: dict[str, Digest]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _every_class_has_a_label(self) -> Self:
        if not self.multi_label and len(self.labels) < 2:
            raise ValueError(
                "a classifier with one label for a text has at least two to choose from"
            )
        known = range(len(self.classes))
        screened = [g.classes for c in self.calibrations for g in c.groups]
        tested = [g.classes for c in self.calibrations for g in c.override]
        if not all(index in known for classes in screened + tested for index in classes):
            raise ValueError("a threshold is of a class that has no label")
        if self.override and len(self.override.carriers) != len(known):
            raise ValueError("there must be a number of carriers for each label")
        return self

    @property
    def frr_budget(self) -> float:
        """The false-rejection budget; `psim fit` gives all runtimes the same."""
        return self.calibrations[0].frr_budget

    @property
    def views(self) -> Views:
        """The victim's classes, see `models.detection.views`."""
        return views_of(len(self.labels), multi_label=self.multi_label)

    @property
    def classes(self) -> list[str]:
        """Names of the classes: the labels, or off and on of each."""
        return class_names(self.labels, multi_label=self.multi_label)

    def tests_all_texts(self, asked: bool | None) -> bool:
        """Return whether the override test is for all texts, as asked, or by default for None.

        Of a multi-label classifier, most triggers pass unless all are tested.
        """
        return self.multi_label if asked is None else asked

    @property
    def layout(self) -> Layout:
        """Which readings are whose."""
        return Layout(len(self.psim.checkpoints), self.attention)

    @property
    def tested_views(self) -> Views:
        """Views that the override test looks at."""
        return views_with_carriers(self.views, self.override.carriers) if self.override else ()
