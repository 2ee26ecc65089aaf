"""What a bundle says about itself: the schema of `manifest.json`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.engines.registry import DtypeName, EngineName, Runtime

Probability = Annotated[float, Field(ge=0, le=1)]
LEAST_BUDGET = 1e-6
Budget = Annotated[float, Field(ge=LEAST_BUDGET, lt=1)]
"""A false-rejection budget; less than that no number of texts can support."""
LEAST_AGREEMENT = 0.999
"""Share of clean texts on which a runtime decides like the reference, if it is to be chosen."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class VictimRecord(_Record):
    """Which model is guarded."""

    name: str
    model_type: str
    architecture: str
    digest: Digest
    """SHA-256 over the victim's files; the adapter names the victim it was trained for by it."""


class PsimRecord(_Record):
    """How the adapters were trained."""

    layers: int = Field(ge=1)
    """Number of topmost layers that carry the adapters."""
    rank: int = Field(ge=1)
    learning_rate: float
    seed: int
    steps: int
    stopped_because: str
    checkpoints: list[int] = Field(min_length=1, max_length=16)
    """The steps whose adapters are kept, ascending."""
    curve: list[tuple[int, float]]
    """(step, mean confidence on held-out clean texts)."""


class ActivationsRecord(_Record):
    """What the second screen watches."""

    layers: list[int] = Field(min_length=3, max_length=3)
    """Numbers of the layers, from 1, by `models.network.guarded.WATCHED_DEPTHS`."""


class GroupRecord(_Record):
    """The threshold of one predicted class, or of several pooled ones."""

    classes: list[int] = Field(min_length=1)
    texts: int = Field(ge=1)
    threshold: float
    """In standard deviations, see `models.detection.screen.Verdict`."""
    rejected: int = Field(ge=0)
    frr_interval: tuple[Probability, Probability]
    """Clopper-Pearson interval, 95 %, of the false rejection rate that this threshold has."""


class RuntimeRecord(_Record):
    """An engine and the dtype that it computes in."""

    engine: EngineName
    dtype: DtypeName

    @property
    def runtime(self) -> Runtime:
        """Both, to be compared and made."""
        return Runtime(self.engine, self.dtype)


class ParityRecord(_Record):
    """How a runtime compares with torch/float32 on the calibration texts."""

    decisions_agree: Probability
    largest_difference: Probability
    """Of a probability."""
    texts_per_s: float = Field(gt=0)
    """By the machine that fitted."""

    @property
    def passes(self) -> bool:
        """Whether a runtime is as good as the reference, but for its speed."""
        return self.decisions_agree >= LEAST_AGREEMENT


class Calibration(RuntimeRecord):
    """Thresholds for one runtime."""

    frr_budget: Budget
    groups: list[GroupRecord] = Field(min_length=1)
    parity: ParityRecord


class FitRecord(_Record):
    """What fitting took."""

    created: str
    texts_train: int
    texts_stop: int
    texts_calibrate: int
    seconds: float
    peak_memory_mb: int


class LimitRecord(_Record):
    """What a single detector may say of a text before it is called poisoned."""

    least: float
    """Log-odds or log-distance from which it is."""
    unit: float = Field(gt=0)
    """A standard deviation of clean texts, of the score."""


class ChangeRecord(RuntimeRecord):
    """What recalibrating has changed for one predicted class of one runtime."""

    label: str
    before: float
    after: float
    """Thresholds, each in standard deviations of its own calibration texts."""
    fitted: list[LimitRecord] = Field(min_length=1)
    """By detector, what it was by `psim fit`."""
    risen: float
    """By how much more a detector may say since, in those standard deviations; of all features, the
    most."""
    clean: int = Field(ge=0)
    """Texts, passed or false alarms, and how many of them are flagged."""
    clean_flagged_before: int = Field(ge=0)
    clean_flagged_after: int = Field(ge=0)
    poisoned: int = Field(ge=0)
    """Texts that were marked so, and how many of them are flagged."""
    poisoned_flagged_before: int = Field(ge=0)
    poisoned_flagged_after: int = Field(ge=0)


class RecalibrationRecord(_Record):
    """Which traffic the calibration is of, if it is not that of `psim fit`; counts are of texts."""

    created: str
    parent: Digest
    """The bundle that was recalibrated."""
    source: str
    """Name of the audit's export."""
    source_digest: Digest
    first: str
    last: str
    """Between when its rows were answered."""
    passed: int = Field(ge=0)
    false_alarms: int = Field(ge=0)
    poisoned: int = Field(ge=0)
    unmarked: int = Field(ge=0)
    """Flagged or not screened, and not marked: not used."""
    others: int = Field(ge=0)
    """Rows of other bundles: not used."""
    changes: list[ChangeRecord] = Field(min_length=1)


class Manifest(_Record):
    """A bundle's table of contents."""

    schema_version: Literal[4]
    victim: VictimRecord
    labels: list[str] = Field(min_length=2)
    max_length: int = Field(ge=8)
    psim: PsimRecord
    activations: ActivationsRecord | None
    """None if the victim has no layer that can be watched."""
    calibrations: list[Calibration] = Field(min_length=1)
    default: RuntimeRecord
    """The fastest runtime of those that agree with the reference, where it was fitted."""
    fit: FitRecord
    recalibration: RecalibrationRecord | None = None
    """None if the calibration is that of `psim fit`."""
    files: dict[str, Digest]
    versions: dict[str, str]
