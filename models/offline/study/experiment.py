"""One victim of a study: its texts, what it does alone, and how a defence did on it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
    Defended,
    classes_of,
    outcome,
    unflagged,
)
from models.offline.io.classifiers import load_classifier, max_length_of
from models.offline.io.inference import predict
from models.offline.io.samples import Sample
from models.offline.study.cache import Step, StepCache, digest_of

TIMED = 64
"""Clean texts by which a defence's time is measured, beside the bare victim's on the same."""
SCORES = "scores.safetensors"


@dataclass
class Case:
    """A victim, and the texts that defences are fitted and measured on."""

    victim: Step
    published: Step
    """The weights that the victim was tuned from."""
    train: list[Sample]
    """Clean texts for fitting; the victim was tuned on them too, as in the paper."""
    dev: list[Sample]
    """Clean texts for choosing thresholds."""
    clean: list[Sample]
    poisoned: list[str]
    targets: list[str]
    """The attacker's label for each poisoned text."""
    paraphrased: dict[str, tuple[list[Sample], list[Sample]]]
    """By paraphraser: rewritten clean test texts, and rewritten poisoned ones of other classes."""
    seed: int
    dtype: str

    @cached_property
    def engine(self) -> TorchEngine:
        """The victim alone."""
        return bare_engine(self.victim, self.dtype)

    @cached_property
    def labels(self) -> list[str]:
        """Names of the victim's classes in their order."""
        return list(self.victim.result["labels"])

    @cached_property
    def inputs(self) -> dict[str, object]:
        """What every result on this case depends on."""
        return {
            "victim": self.victim.key,
            "fit": digest_of((self.train, self.dev)),
            "test": digest_of((self.clean, self.poisoned, self.targets)),
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def classify(self, texts: Sequence[str]) -> FloatArray:
        """Return the victim's probabilities, shape (len(texts), C)."""
        return predict(self.engine, self.engine.encode(texts), classifier=True)


@dataclass(frozen=True)
class Contender:
    """How one defence did."""

    name: str
    outcome: AttackOutcome
    passes: float | None
    """Forward passes per text beside that of the victim; None if not known."""
    time: float | None
    """Seconds per text over those of the bare victim, which 1 is; None if not known."""
    details: dict[str, Any]
    """What is particular to the defence."""

    def as_row(self) -> dict[str, Any]:
        """Return what the row of a cell keeps."""
        return asdict(self.outcome) | {"passes": self.passes, "time": self.time} | self.details


@dataclass(frozen=True)
class Arena:
    """A case with the truth about it, and what the victim does alone."""

    case: Case
    truth: Classes
    targets: Classes
    predicted_clean: Classes
    predicted_poisoned: Classes

    @staticmethod
    def load(case: Case, said: Step) -> "Arena":
        """Read what `alone` has kept of a model."""
        return Arena(case, **load_scores(said.folder / SCORES))

    @property
    def undefended(self) -> AttackOutcome:
        """What the attack does where nothing is in its way."""
        views = unflagged(self.predicted_clean), unflagged(self.predicted_poisoned)
        return outcome(views[0], self.truth, views[1], self.targets)

    def entry(
        self,
        name: str,
        clean: Defended,
        poisoned: Defended,
        passes: float,
        time: float,
        **details: Any,
    ) -> Contender:
        """ZScore a defence against the truth."""
        fires = self.predicted_poisoned == self.targets
        measured = outcome(clean, self.truth, poisoned, self.targets, fires)
        return Contender(name, measured, passes, time, details)


class Alone(Guarded):
    """A victim without PSIM, for an engine: nothing of PEFT is in its way, or in its time."""

    def __init__(self, victim: nn.Module) -> None:
        nn.Module.__init__(self)
        self.victim = victim

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the victim's probabilities in float32, shape (rows, C)."""
        logits: torch.Tensor = self.victim(**inputs).logits
        return logits.float().softmax(-1)


def bare_engine(model: Step, dtype: str) -> TorchEngine:
    """Load a model of the study by itself."""
    victim, tokenizer = load_classifier(str(model.folder / "model"))
    return TorchEngine(Alone(victim), tokenizer, max_length_of(victim, tokenizer), dtype)


def alone(store: StepCache, case: Case, model: Step) -> Step:
    """Let a model classify all texts without a defence; keeps the fields of `Arena`."""

    def make(folder: Path) -> object:
        engine = case.engine if model is case.victim else bare_engine(model, case.dtype)

        def predicted(texts: Sequence[str]) -> Classes:
            classes: Classes = predict(engine, engine.encode(texts), classifier=True).argmax(1)
            return classes

        save_scores(
            folder,
            truth=classes_of(case.clean, case.labels),
            targets=classes_of([Sample("", label) for label in case.targets], case.labels),
            predicted_clean=predicted([s.text for s in case.clean]),
            predicted_poisoned=predicted(case.poisoned),
        )
        return {}

    inputs = {key: case.inputs[key] for key in ("test", "dtype")}
    return store.step("bare", {**inputs, "model": model.key}, make)


def save_scores(folder: Path, **arrays: NDArray[Any]) -> None:
    """Keep what a step says about each text."""
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / SCORES)


def load_scores(file: Path) -> dict[str, NDArray[Any]]:
    """Read what `save_scores` has kept."""
    arrays: dict[str, NDArray[Any]] = load_file(file)
    return arrays


def relative_time(case: Case, extra: Callable[[list[str]], object]) -> float:
    """Return the time of the victim and `extra`, over that of the victim alone, one by one."""
    texts = [s.text for s in case.clean[:TIMED]]
    seconds = []
    for run in (case.classify, extra):
        run(texts[:2])  # warm
        started = time.perf_counter()
        for text in texts:
            run([text])
        seconds.append(time.perf_counter() - started)
    return sum(seconds) / seconds[0]
