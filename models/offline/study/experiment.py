"""One experiment of a study: a victim, its texts, its bare predictions, and results of defences."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from models.detection.screen import FloatArray
from models.engines.pytorch import TorchEngine
from models.network.guarded import Guarded
from models.network.trunk import Inputs
from models.offline.evaluation.metrics import (
    AttackOutcome,
    Classes,
    DefendedPredictions,
    classes_of,
    measure_outcome,
    undefended,
)
from models.offline.io.classifiers import load_classifier, short_length_of
from models.offline.io.inference import predict
from models.offline.io.samples import Sample
from models.offline.study.cache import Step, StepCache, digest_of
from models.offline.study.defences.states import States, read_states

TIMED_TEXTS = 64
"""Clean texts on which the time of a defence and of the bare victim is measured."""
SCORES = "scores.safetensors"
"""File of a step's results on each text."""
CLEAN, POISONED = "clean", "poisoned"


def honest_group(name: str) -> str:
    """Return what `Experiment.groups` calls a kind of honest texts."""
    return f"honest {name}"


@dataclass
class Experiment:
    """A victim, and the texts that defences are fitted and measured on."""

    victim: Step
    published: Step
    """The weights that the victim was tuned from."""
    train: list[Sample]
    """Clean texts for fitting. The victim was tuned on them too, as in the paper."""
    dev: list[Sample]
    """Clean texts for choosing thresholds."""
    clean: list[Sample]
    poisoned: list[str]
    targets: list[str]
    """The attacker's label for each poisoned text."""
    paraphrased: dict[str, tuple[list[Sample], list[Sample]]]
    """Clean test texts, and poisoned ones of other classes than the target, by paraphraser."""
    seed: int
    dtype: str
    honest: dict[str, list[str]] = field(default_factory=dict)
    """Honest texts unlike those for fitting, by kind."""
    _states: dict[str, States] = field(default_factory=dict)

    @cached_property
    def engine(self) -> TorchEngine:
        """The victim without PSIM, ready to run."""
        return bare_engine(self.victim, self.dtype)

    @cached_property
    def labels(self) -> list[str]:
        """Names of the victim's classes, in order."""
        return list(self.victim.result["labels"])

    @cached_property
    def inputs(self) -> dict[str, object]:
        """Everything that a result on this experiment depends on, except honest texts."""
        return {
            "victim": self.victim.key,
            "fit": digest_of((self.train, self.dev)),
            "test": digest_of((self.clean, self.poisoned, self.targets)),
            "dtype": self.dtype,
            "seed": self.seed,
        }

    @property
    def groups(self) -> dict[str, list[str]]:
        """Texts that a defence which rejects is measured on, by kind."""
        own = {CLEAN: [s.text for s in self.clean], POISONED: self.poisoned}
        return own | {honest_group(name): found for name, found in self.honest.items()}

    @property
    def honest_inputs(self) -> dict[str, object]:
        """What a result on honest texts depends on besides `inputs`; nothing if there are none."""
        return {"honest": digest_of(self.honest)} if self.honest else {}

    def classify(self, texts: Sequence[str]) -> FloatArray:
        """Return the victim's probabilities, shape (len(texts), C)."""
        return predict(self.engine, self.engine.encode(texts), classifier=True)

    def read(self, texts: Sequence[str]) -> States:
        """Return the victim's probabilities and hidden states."""
        return read_states(self.engine, texts)

    def read_once(self, texts: Sequence[str]) -> States:
        """Do the same, and remember it for other defences."""
        key = digest_of(list(texts))
        if key not in self._states:
            self._states[key] = self.read(texts)
        return self._states[key]


@dataclass(frozen=True)
class DefenceResult:
    """Outcome and cost of one defence."""

    name: str
    outcome: AttackOutcome
    passes: float | None
    """Forward passes per text in addition to the victim's own; None if unknown."""
    time: float | None
    """Time per text relative to the bare victim, 1 if there is no defence; None if unknown."""
    details: dict[str, Any]
    """Further fields, which depend on the defence."""

    def as_row(self) -> dict[str, Any]:
        """Return the result as it is kept in the row of a cell."""
        return asdict(self.outcome) | {"passes": self.passes, "time": self.time} | self.details


@dataclass(frozen=True)
class Reference:
    """True classes, attacker's targets and bare predictions, which defences are compared with."""

    experiment: Experiment
    truth: Classes
    targets: Classes
    predicted_clean: Classes
    predicted_poisoned: Classes

    @staticmethod
    def load(experiment: Experiment, bare: Step) -> "Reference":
        """Read the results of `predict_bare`."""
        return Reference(experiment, **load_scores(bare.folder / SCORES))

    @property
    def undefended(self) -> AttackOutcome:
        """Outcome of the attack without a defence."""
        clean, poisoned = undefended(self.predicted_clean), undefended(self.predicted_poisoned)
        return measure_outcome(clean, self.truth, poisoned, self.targets)

    def measure(
        self,
        name: str,
        clean: DefendedPredictions,
        poisoned: DefendedPredictions,
        passes: float,
        time: float,
        **details: Any,
    ) -> DefenceResult:
        """Measure a defence by its predictions on the test texts."""
        fires = self.predicted_poisoned == self.targets
        outcome = measure_outcome(clean, self.truth, poisoned, self.targets, fires)
        return DefenceResult(name, outcome, passes, time, details)


class BareClassifier(Guarded):
    """A victim without PSIM, for an engine. No PEFT wrapper adds to its time."""

    def __init__(self, victim: nn.Module) -> None:
        nn.Module.__init__(self)
        self.victim = victim

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the victim's probabilities in float32, shape (rows, C)."""
        logits: torch.Tensor = self.victim(**inputs).logits
        return logits.float().softmax(-1)


def bare_engine(model: Step, dtype: str) -> TorchEngine:
    """Load a trained model of the study without PSIM."""
    victim, tokenizer = load_classifier(str(model.folder / "model"))
    return TorchEngine(BareClassifier(victim), tokenizer, short_length_of(victim, tokenizer), dtype)


def predict_bare(cache: StepCache, experiment: Experiment, model: Step) -> Step:
    """Classify all test texts without a defence; the step keeps the fields of `Reference`."""

    def make(folder: Path) -> object:
        is_victim = model is experiment.victim
        engine = experiment.engine if is_victim else bare_engine(model, experiment.dtype)

        def predicted(texts: Sequence[str]) -> Classes:
            classes: Classes = predict(engine, engine.encode(texts), classifier=True).argmax(1)
            return classes

        targets = [Sample("", label) for label in experiment.targets]
        save_scores(
            folder,
            truth=classes_of(experiment.clean, experiment.labels),
            targets=classes_of(targets, experiment.labels),
            predicted_clean=predicted([s.text for s in experiment.clean]),
            predicted_poisoned=predicted(experiment.poisoned),
        )
        return {}

    inputs = {key: experiment.inputs[key] for key in ("test", "dtype")}
    return cache.step("bare", {**inputs, "model": model.key}, make)


def save_scores(folder: Path, **arrays: NDArray[Any]) -> None:
    """Save the results of a step on each text."""
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / SCORES)


def load_scores(file: Path) -> dict[str, NDArray[Any]]:
    """Read the results that `save_scores` has saved."""
    arrays: dict[str, NDArray[Any]] = load_file(file)
    return arrays


def relative_time(experiment: Experiment, defend: Callable[[list[str]], object]) -> float:
    """Return the time of victim and defence over that of the victim alone, one text at a time."""
    texts = [s.text for s in experiment.clean[:TIMED_TEXTS]]
    seconds = []
    for run in (experiment.classify, defend):
        run(texts[:2])  # warm-up
        started = time.perf_counter()
        for text in texts:
            run([text])
        seconds.append(time.perf_counter() - started)
    return sum(seconds) / seconds[0]
